"""Every estimator of the meta-gradient against full unrolling, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.train.adapt.estimators import (
    Bayesian,
    Binomial,
    Estimate,
    FirstOrder,
    Implicit,
    Truncated,
    Unrolled,
)
from surgery.train.adapt.estimators.conjugate import conjugate_gradients
from surgery.train.adapt.inner import Meta, Problem, Task
from surgery.train.adapt.rules import PerParameter, Preconditioned, Shared, StepRule

DOUBLE = torch.float64
STEPS = 5
LR = 0.2
RULES: dict[str, StepRule] = {
    "shared": Shared(LR),
    "per-parameter": PerParameter(LR),
    "preconditioned": Preconditioned(LR),
}


def network(values: Mapping[str, Tensor], samples: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of a network of two layers."""
    hidden = torch.tanh(F.linear(samples["x"], values["w1"], values["b1"]))
    return (F.linear(hidden, values["w2"]) - samples["y"]).square().mean()


def mirrored(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """A smooth map of ``w1`` with parameters of its own, which are no identity."""
    z = values["w1"]
    return {**values, "w1": z * torch.exp(values["map.s"]) + 0.3 * torch.sin(z) * values["map.c"]}


def drawn(seed: int = 0) -> tuple[Meta, Task]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DOUBLE, generator=draw)

    start = {"w1": normal(4, 3), "b1": normal(4), "w2": normal(2, 4)}
    support, query = ({"x": normal(6, 3), "y": normal(6, 2)} for _ in range(2))
    return Meta(start, {}, {}), Task(support, query)


def case(kind: str, rule: str) -> tuple[Problem, Meta, Task]:
    """A problem of each sort, with everything that can be learned away from where it starts."""
    meta, task = drawn()
    problem = Problem(network, RULES[rule], STEPS)
    others: dict[str, Tensor] = {}
    start = meta.start
    if kind == "mirrored":
        others = {
            "map.s": 0.1 * torch.ones(4, 3, dtype=DOUBLE),
            "map.c": torch.tensor(0.7).double(),
        }
        problem = replace(problem, primal=mirrored)
    if kind == "head":
        start, others = {"w2": start["w2"]}, {n: start[n] for n in ("w1", "b1")}
    draw = torch.Generator().manual_seed(1)
    extra = {
        n: t + 0.1 * torch.randn(t.shape, dtype=DOUBLE, generator=draw)
        for n, t in problem.rule.learned(start).items()
    }
    return problem, Meta(start, others, extra), task


def apart(one: Meta, other: Meta) -> float:
    """Largest difference, over the largest entry of ``other``."""
    pairs = [(a[n], b[n]) for a, b in zip(one, other, strict=True) for n in b]
    assert [a.keys() for a in one] == [b.keys() for b in other]
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def autograd(problem: Problem, meta: Meta, task: Task) -> tuple[Meta, Tensor]:
    """The exact meta-gradient by torch.autograd alone, written out step by step."""
    leaves = meta.map(lambda t: t.clone().requires_grad_(True))
    state = leaves.start
    for _ in range(problem.steps):
        values = problem.primal({**leaves.others, **state})
        loss = problem.loss(values, task.support)
        found = torch.autograd.grad(loss, [values[n] for n in state], create_graph=True)
        update = problem.rule.update(leaves.extra, dict(zip(state, found, strict=True)))
        pull = {n: problem.proximal * (state[n] - leaves.start[n]) for n in state}
        scale = problem.rule.lr
        state = {n: state[n] - update[n] - scale * pull[n] for n in state}
    loss = problem.loss(problem.primal({**leaves.others, **state}), task.query)
    flat = [t for part in leaves for t in part.values()]
    found = iter(torch.autograd.grad(loss, flat))
    return leaves.map(lambda _: next(found)), loss.detach()


CASES = [*itertools.product(("plain", "mirrored", "head"), RULES)]


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_unrolling_is_what_autograd_says(kind: str, rule: str):
    problem, meta, task = case(kind, rule)
    expected, loss = autograd(problem, meta, task)
    found = Unrolled()(problem, meta, task)
    # The same operations in another order: float64 rounding through five steps.
    assert apart(found.gradient, expected) < 1e-12
    assert abs(float(found.loss - loss)) < 1e-13


@pytest.mark.parametrize(("kind", "rule"), CASES)
@pytest.mark.parametrize("side_by_side", [1, 3])
def test_all_terms_of_the_expansion_are_unrolling(kind: str, rule: str, side_by_side: int):
    problem, meta, task = case(kind, rule)
    expected = Unrolled()(problem, meta, task)
    found = Binomial(STEPS, side_by_side)(problem, meta, task)
    assert apart(found.gradient, expected.gradient) < 1e-10
    # More terms than steps have nothing to add.
    more = Binomial(STEPS + 3, side_by_side)(problem, meta, task)
    assert apart(more.gradient, found.gradient) == 0.0
    fewer = Binomial(STEPS - 1, side_by_side)(problem, meta, task)
    assert apart(fewer.gradient, expected.gradient) > 1e-6


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_no_terms_are_first_order(kind: str, rule: str):
    problem, meta, task = case(kind, rule)
    first = FirstOrder()(problem, meta, task)
    for other in (Binomial(0), Truncated(0)):
        # Steps are summed in another order.
        assert apart(other(problem, meta, task).gradient, first.gradient) < 1e-13
    assert apart(Unrolled()(problem, meta, task).gradient, first.gradient) > 1e-2


@pytest.mark.parametrize("terms", range(STEPS + 1))
def test_the_cascade_is_the_binomial_expansion(terms: int):
    """Explicit Hessians, and every subset of at most ``terms`` of them."""
    problem, meta, task = case("plain", "shared")
    expected = explicit(problem, meta, task, terms)
    for side_by_side in (1, 2):
        found = Binomial(terms, side_by_side)(problem, meta, task)
        assert apart(found.gradient, expected) < 1e-10


@pytest.mark.parametrize("terms", range(STEPS + 1))
def test_the_authors_scale_weighs_every_second_derivative(terms: int):
    problem, meta, task = case("plain", "shared")
    scale = max(terms, 1) / STEPS
    expected = explicit(problem, meta, task, terms, scale)
    for side_by_side in (1, 2):
        found = Binomial(terms, side_by_side, scale)(problem, meta, task)
        assert apart(found.gradient, expected) < 1e-10
    whole = Binomial(terms)(problem, meta, task).gradient
    assert (apart(found.gradient, whole) > 1e-4) == (0 < terms < STEPS)


def explicit(problem: Problem, meta: Meta, task: Task, terms: int, scale: float = 1.0) -> Meta:
    """``Σ_{l ≤ L} Σ_{k_1 < ... < k_l} ∏ (-c a H_k) g`` with matrices."""
    names = list(meta.start)
    shapes = [meta.start[n].shape for n in names]

    def unpacked(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in shapes])
        return {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}

    def loss(flat: Tensor, samples: Any) -> Tensor:
        return problem.loss(unpacked(flat), samples)

    z = torch.cat([meta.start[n].flatten() for n in names])
    hessians = []
    for _ in range(problem.steps):
        hessians.append(torch.func.jacrev(torch.func.grad(loss))(z, task.support))
        z = z - LR * torch.func.grad(loss)(z, task.support)
    g = torch.func.grad(loss)(z, task.query)
    total = torch.zeros_like(g)
    for count in range(terms + 1):
        for chosen in itertools.combinations(range(problem.steps), count):
            product = g
            for k in reversed(chosen):
                product = -scale * LR * hessians[k] @ product
            total += product
    return Meta(unpacked(total), {}, {})


def test_the_cascade_skips_rows_that_are_not_needed():
    """With nothing learned but the start, L rounds take L (K - L + 1) products."""
    from surgery.train.adapt.estimators.binomial import cascade

    calls: list[int] = []

    class Counted:
        whole = False

        def __call__(self, states: Any, rows: Any, kept: int) -> Any:
            calls.append(len(rows))
            return [{"z": 0.1 * row["z"]} for row in rows], {}

    state = {"z": torch.ones(1, dtype=DOUBLE)}
    found = cascade(Counted(), [state] * 6, state, 2)
    assert calls == [4, 4]
    assert float(found.first["z"]) == pytest.approx(1 - 5 * 0.1 + 10 * 0.01, abs=1e-14)


def test_truncation_differentiates_the_last_steps():
    problem, meta, task = case("plain", "shared")
    exact = Unrolled()(problem, meta, task).gradient
    for terms in range(STEPS + 1):
        path = problem.path(meta, task.support, STEPS, states=True)
        tail = Meta(path.states[STEPS - terms], {}, {})
        expected = Unrolled()(replace(problem, steps=terms), tail, task).gradient
        found = Truncated(terms)(problem, meta, task).gradient
        # States are a running sum in the one and one sum in the other.
        assert apart(found, expected) < 1e-13
        assert (apart(found, exact) < 1e-12) == (terms == STEPS)


def test_the_binomial_error_falls_faster_than_the_truncated_one():
    """The paper's claim, where its bound holds: a convex inner loss and a small step size."""
    meta, task = drawn()
    start = {"w": meta.start["w1"]}

    def convex(values: Mapping[str, Tensor], samples: Mapping[str, Tensor]) -> Tensor:
        logits = F.linear(samples["x"], values["w"])
        return torch.logsumexp(logits, 1).mean() - (logits[:, 0]).mean()

    problem = Problem(convex, Shared(0.1), 10)
    meta = Meta(start, {}, {})
    exact = Unrolled()(problem, meta, task).gradient
    errors = [apart(Binomial(n)(problem, meta, task).gradient, exact) for n in range(4)]
    cut = [apart(Truncated(n)(problem, meta, task).gradient, exact) for n in range(4)]
    assert errors[0] == pytest.approx(cut[0], rel=1e-9)
    for terms in (1, 2, 3):
        assert errors[terms] < 0.5 * cut[terms]
        assert errors[terms] < 0.4 * errors[terms - 1]


@pytest.mark.parametrize("kind", ["plain", "head"])
def test_implicit_differentiation_is_unrolling_to_rest(kind: str):
    problem, meta, task = case(kind, "shared")
    problem = replace(problem, rule=Shared(0.1), proximal=2.0, steps=400)
    at_rest = problem.path(meta, task.support, 400)
    assert float(at_rest.trace.norms[-1]) < 1e-12, "the inner loop has not come to rest"
    expected, _ = autograd(problem, meta, task)
    found = Implicit(solver_steps=60)(problem, meta, task).gradient
    assert apart(found, expected) < 1e-9
    one = Implicit(solver_steps=1)(problem, meta, task)
    assert 1e-4 < apart(one.gradient, expected) < 0.5
    # And it says so: the residual is that of the system, written out with matrices.
    assert float(one.solved.residual) > 1e-3
    assert not bool(one.solved.indefinite)


def test_implicit_differentiation_needs_the_pull_to_the_start():
    problem, meta, task = case("plain", "shared")
    with pytest.raises(ValueError, match=r"inner\.proximal"):
        Implicit()(problem, meta, task)
    problem, meta, task = case("plain", "per-parameter")
    with pytest.raises(ValueError, match="step rule learns"):
        Implicit()(replace(problem, proximal=1.0), meta, task)


def test_the_bayesian_gradient_is_unrolling_to_rest():
    """Of both halves of the prior, its means and its variances."""
    problem, meta, task = case("plain", "shared")
    problem = replace(problem, rule=Shared(0.1), steps=2500)
    estimator = Bayesian(kl_weight=6.0, draws=3, solver_steps=80)
    meta = meta._replace(extra={n: t + 9 for n, t in estimator.learned(meta.start, 0).items()})
    torch.manual_seed(3)
    found = estimator(problem, meta, task)
    assert float(found.trace.norms[-1]) < 1e-10, "the inner loop has not come to rest"
    torch.manual_seed(3)
    expected = bayesian_by_differences(estimator, problem, meta, task)
    for ours, theirs in zip(found.gradient, expected, strict=True):
        for name, slope in theirs.items():
            # Central differences of step 1e-4 are good to about 1e-7.
            assert float(ours[name].flatten()[0]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def bayesian_by_differences(
    estimator: Bayesian, problem: Problem, meta: Meta, task: Task
) -> tuple[dict[str, float], ...]:
    """Slopes of the query loss along the first entry of each tensor."""
    step = 1e-4

    def loss(part: int, name: str, by: float) -> float:
        moved = {n: t.clone() for n, t in meta[part].items()}
        moved[name].flatten()[0] += by
        parts = [*meta]
        parts[part] = moved
        torch.manual_seed(3)
        return float(estimator(problem, Meta(*parts), task).loss)

    return tuple(
        {n: (loss(i, n, step) - loss(i, n, -step)) / (2 * step) for n in part if "w2" in n}
        for i, part in enumerate(meta)
    )


def test_the_posterior_knows_more_than_the_prior():
    problem, meta, task = case("plain", "shared")
    problem = replace(problem, rule=Shared(0.05), steps=100)
    estimator = Bayesian(kl_weight=0.6, predictive_draws=4)
    meta = meta._replace(extra={n: t + 9 for n, t in estimator.learned(meta.start, 0).items()})
    prior, *_, last = (
        estimator.posterior(s) for s in estimator.adapted(problem, meta, task.support, 100)
    )
    assert prior.variance.keys() == meta.start.keys()
    assert float(last.variance["w2"].mean()) < 0.8 * float(prior.variance["w2"].mean())
    state = estimator.adapted(problem, meta, task.support, 1)[-1]
    drawn = estimator.drawn(problem, meta, state, lambda values: values["w2"])
    assert drawn.shape == (4, 2, 4)
    assert float(drawn.std(0).min()) > 0
    predicted = estimator.predicted(
        problem, meta, state, lambda values: values["w2"], lambda each: each.mean(0)
    )
    assert predicted.shape == (2, 4)


ESTIMATORS = {
    "unrolled": Unrolled(),
    "first_order": FirstOrder(),
    "truncated": Truncated(2),
    "binomial": Binomial(2),
    "binomial side by side": Binomial(2, 2),
    "implicit": Implicit(3),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_tasks_side_by_side_are_tasks_one_by_one(name: str):
    problem, meta, _ = case("plain", "shared")
    if name == "implicit":
        problem = replace(problem, proximal=1.0)
    tasks = [drawn(seed)[1] for seed in range(3)]
    stacked = Task(*({k: torch.stack([t[i][k] for t in tasks]) for k in "xy"} for i in range(2)))
    estimate = ESTIMATORS[name]
    mapped = torch.func.vmap(lambda task: estimate(problem, meta, task))(stacked)
    for i, task in enumerate(tasks):
        one = estimate(problem, meta, task)
        same = Estimate(*torch.utils._pytree.tree_map(lambda t, i=i: t[i], tuple(mapped)))
        assert apart(Meta(*same.gradient), one.gradient) < 1e-12
        assert torch.allclose(same.trace[0], one.trace.losses, rtol=1e-12)


@pytest.mark.parametrize("name", [*ESTIMATORS])
def test_gradients_are_those_of_finite_differences_where_they_are_exact(name: str):
    """One inner step: all estimators but the first-order one are exact, or at rest."""
    problem, meta, task = case("plain", "shared")
    problem = replace(problem, steps=1)
    if name == "implicit":
        pytest.skip("exact at rest only: test_implicit_differentiation_is_unrolling_to_rest")

    def loss(w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        leaf = {"w1": w1, "b1": b1, "w2": w2}
        values = {n: v.detach() for n, v in leaf.items()}
        gradient = ESTIMATORS[name](problem, Meta(values, {}, {}), task)
        return _Given.apply(gradient.loss, *gradient.gradient.start.values(), *leaf.values())

    leaves = [t.clone().requires_grad_(True) for t in meta.start.values()]
    exact = torch.autograd.gradcheck(loss, leaves, raise_exception=False)
    assert exact == (name != "first_order")


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *rest: Tensor) -> Tensor:
        ctx.save_for_backward(*rest[: len(rest) // 2])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = ctx.saved_tensors
        return (None, *[None] * len(found), *(grads[0] * g for g in found))


def test_an_indefinite_system_is_reported():
    problem, meta, task = case("plain", "shared")
    found = Implicit(solver_steps=30)(replace(problem, proximal=1e-3), meta, task)
    assert bool(found.solved.indefinite)
    assert float(found.solved.residual) > 0.01


def test_no_steps_are_the_start():
    """Of every estimator: the gradient of the query loss there."""
    problem, meta, task = case("plain", "shared")
    problem = replace(problem, steps=0)
    expected = torch.func.grad(problem.loss)(meta.start, task.query)
    for estimator in (Unrolled(), FirstOrder(), Truncated(2), Binomial(2), Binomial(2, 2)):
        found = estimator(problem, meta, task)
        assert found.trace.losses.shape == (0,)
        assert apart(found.gradient, Meta(expected, {}, {})) < 1e-14
    bayesian = Bayesian()
    meta = meta._replace(extra=bayesian.learned(meta.start, 0))
    (only,) = bayesian.adapted(problem, meta, task.support, 0)
    assert torch.equal(bayesian.posterior(only).mean["w1"], meta.start["w1"])


def test_little_is_known_where_there_was_no_support():
    """Bumps with a weight each: the posterior of a bump is narrow where samples lie under it."""
    centres = torch.tensor([-2.0, 0.0, 2.0], dtype=DOUBLE)

    def bumps(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.exp(-4 * (x - centres).square()) @ values["w"]

    def loss(values: Mapping[str, Tensor], samples: Mapping[str, Tensor]) -> Tensor:
        return (bumps(values, samples["x"]) - samples["y"]).square().mean()

    x = torch.linspace(-2.3, -1.7, 8, dtype=DOUBLE).unsqueeze(1)
    estimator = Bayesian(kl_weight=0.5, draws=30, predictive_draws=100)
    meta = Meta({"w": torch.zeros(3, dtype=DOUBLE)}, {}, {})
    meta = meta._replace(extra={"log_variance:w": torch.zeros(3, dtype=DOUBLE)})
    problem = Problem(loss, Shared(1.0), 100)
    torch.manual_seed(0)
    state = estimator.adapted(problem, meta, {"x": x, "y": torch.ones(8, dtype=DOUBLE)}, 100)[-1]
    # Of a quadratic loss: 1 / variance = 1 / prior + 2 mean(bump²) / w, apart from the draws.
    squares = torch.exp(-4 * (x - centres).square()).square().mean(0)
    expected = 1 / (1 + 2 * squares / (0.5 / 8))
    found = estimator.posterior(state).variance["w"]
    assert torch.allclose(found, expected, rtol=0.5)  # 30 draws: their own variance is off by 26 %
    drawn = estimator.drawn(problem, meta, state, lambda values: bumps(values, centres[:, None]))
    near, middle, far = drawn.std(0).tolist()
    assert near < 0.4 * middle
    assert near < 0.4 * far


def test_conjugate_gradients_solve_and_stop():
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, dtype=DOUBLE, generator=draw)
    matrix = root @ root.T + torch.eye(6, dtype=DOUBLE)
    b = {"a": torch.randn(2, dtype=DOUBLE, generator=draw), "b": torch.ones(4, dtype=DOUBLE)}

    def times(v: dict[str, Tensor]) -> dict[str, Tensor]:
        product = matrix @ torch.cat([v["a"], v["b"]])
        return {"a": product[:2], "b": product[2:]}

    expected = torch.linalg.solve(matrix, torch.cat([*b.values()]))
    diagonal = {"a": matrix.diagonal()[:2], "b": matrix.diagonal()[2:]}
    for given in (None, diagonal):
        # 20 steps on six unknowns: what is done stays done.
        solved = conjugate_gradients(times, b, steps=20, diagonal=given)
        assert torch.allclose(torch.cat([*solved.x.values()]), expected, rtol=1e-9, atol=1e-12)
        assert float(solved.solved.residual) < 1e-9
        assert not bool(solved.solved.indefinite)


def test_conjugate_gradients_stop_where_the_matrix_is_not_definite():
    signs = torch.tensor([1.0, -1.0], dtype=DOUBLE)
    solved = conjugate_gradients(
        lambda v: {"x": signs * v["x"]}, {"x": torch.tensor([1.0, 2.0], dtype=DOUBLE)}, steps=5
    )
    assert bool(solved.solved.indefinite)
    assert torch.equal(solved.x["x"], torch.zeros(2, dtype=DOUBLE))
