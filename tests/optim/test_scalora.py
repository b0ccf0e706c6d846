"""The analytic column scaling of ScaLoRA, against searches for something better."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from surgery.optim.scalora import FLOOR, column_scaling

OUT, IN, RANK = 23, 17, 4
L, LR = 3.0, 0.05


def pair(seed: int, *, rank_of_gradient: int = OUT, batch: tuple[int, ...] = ()) -> list[Tensor]:
    """A, B, and the gradient of the weight, in float64. From 100 on columns are much alike."""
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, RANK, IN, generator=draw, dtype=torch.float64)
    B = torch.randn(*batch, OUT, RANK, generator=draw, dtype=torch.float64)
    if seed >= 100:
        A = A + 3 * A[:1]
        B = B + 3 * B[:, :1]
    left = torch.randn(*batch, OUT, rank_of_gradient, generator=draw, dtype=torch.float64)
    right = torch.randn(*batch, rank_of_gradient, IN, generator=draw, dtype=torch.float64)
    return [A, B, left @ right]


def gradients(A: Tensor, B: Tensor, G: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    return scaling * B.mT @ G, scaling * G @ A.mT


def objective(
    A: Tensor, B: Tensor, G: Tensor, alpha: Tensor, beta: Tensor, scaling: float = 1.0
) -> Tensor:
    """f as the paper has it, from the gradient of the weight itself."""
    step = G @ A.mT @ torch.diag_embed(beta**2) @ A + B @ torch.diag_embed(alpha**2) @ B.mT @ G
    return (G / L - scaling**2 * LR * step).square().sum()


def solved(A: Tensor, B: Tensor, G: Tensor, scaling: float = 1.0):
    grad_A, grad_B = gradients(A, B, G, scaling)
    return column_scaling(A, B, grad_A, grad_B, lipschitz=L, lr=LR, scaling=scaling)


def seeds_of(kind: str, count: int) -> list[int]:
    return [seed for seed in range(85, 115) if solved(*pair(seed))[2] == kind][:count]


COLUMN, SCALAR = seeds_of("column", 4), seeds_of("scalar", 4)


def test_both_kinds_occur():
    assert len(COLUMN) == len(SCALAR) == 4


@pytest.mark.parametrize("scaling", [1.0, 0.25, 2.0])
@pytest.mark.parametrize("seed", COLUMN)
def test_the_objective_is_stationary_in_every_column(seed: int, scaling: float):
    A, B, G = pair(seed)
    alpha, beta, kind = solved(A, B, G, scaling)
    assert kind == "column"
    squares = torch.cat([alpha, beta]).square().requires_grad_()
    value = objective(A, B, G, *squares.sqrt().chunk(2), scaling)
    (slope,) = torch.autograd.grad(value, squares)
    # Against the terms that cancel in it: the inner products of a direction with G.
    size = 2 * scaling**2 * LR / L * (B.mT @ G).square().sum(-1).max()
    assert slope.abs().max() < 1e-11 * size


@pytest.mark.parametrize("seed", COLUMN)
def test_no_perturbation_of_the_columns_is_better(seed: int):
    A, B, G = pair(seed)
    alpha, beta, _ = solved(A, B, G)
    best = objective(A, B, G, alpha, beta)
    draw = torch.Generator().manual_seed(seed)
    for spread in (1e-3, 1e-2, 1e-1, 1.0):
        noise = torch.randn(5000, 2 * RANK, generator=draw, dtype=torch.float64)
        moved = torch.cat([alpha, beta]) * (1 + spread * noise).abs()
        values = _many(A, B, G, moved)
        assert values.min() > best
    one = torch.ones(RANK, dtype=torch.float64)
    assert best < objective(A, B, G, one, one)


def _many(A: Tensor, B: Tensor, G: Tensor, scales: Tensor) -> Tensor:
    """The objective for many pairs: it is quadratic in the squares."""
    terms = [torch.outer(column, column @ G) for column in B.mT]
    terms += [torch.outer(G @ row, row) for row in A]
    flat = torch.stack(terms).flatten(1)
    return (G.flatten() / L - LR * scales.square() @ flat).square().sum(-1)


@pytest.mark.parametrize("seed", [*COLUMN, *SCALAR])
def test_two_numbers_are_the_optimum_that_a_search_finds(seed: int):
    """The scalar form, on problems where it is needed and, forced by rank 1, where it is not."""
    A, B, G = pair(seed)
    alpha, beta, kind = solved(A, B, G)
    if kind == "column":
        A, B = A[:1], B[:, :1]
        alpha, beta, _ = solved(A, B, G)
    assert alpha.unique().numel() == beta.unique().numel() == 1
    found = _search(A, B, G)
    ours = objective(A, B, G, alpha, beta)
    torch.testing.assert_close(ours, objective(A, B, G, *found), rtol=1e-9, atol=0)
    both = torch.stack([alpha[0], beta[0]])
    expected = torch.stack([found[0][0], found[1][0]])
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=FLOOR)


def _search(A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """L-BFGS over the logarithms of the two numbers."""
    logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logs],
        max_iter=500,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def scales() -> tuple[Tensor, Tensor]:
        a, b = logs.exp()
        return a.expand(A.shape[0]), b.expand(A.shape[0])

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(A, B, G, *scales())
        value.backward()
        return value

    optimizer.step(closure)
    a, b = scales()
    return a.detach(), b.detach()


@pytest.mark.parametrize("seed", SCALAR)
def test_the_scalar_form_beats_other_pairs_of_numbers(seed: int):
    A, B, G = pair(seed)
    alpha, beta, kind = solved(A, B, G)
    assert kind == "scalar"
    best = objective(A, B, G, alpha, beta)
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(5000, 2, generator=draw, dtype=torch.float64).mul(0.3).exp()
    scales = torch.cat([alpha, beta]) * factors.repeat_interleave(RANK, -1)
    assert _many(A, B, G, scales).min() > best


def uneven(seed: int) -> list[Tensor]:
    """Columns whose lengths differ by powers of e."""
    draw = torch.Generator().manual_seed(seed)
    A, B, G = (torch.randn(*shape, generator=draw).double() for shape in ((3, 5), (6, 3), (6, 5)))
    a, b, g = (torch.randn(n, generator=draw).double().mul(2).exp() for n in (3, 3, 5))
    return [a[:, None] * A, B * b, G * g]


@pytest.mark.parametrize("seed", [900, 1169])
def test_a_number_that_would_be_negative_is_floored_and_the_other_stands_alone(seed: int):
    A, B, G = uneven(seed)
    grad_A, grad_B = gradients(A, B, G)
    p, q = grad_A.square().sum(), grad_B.square().sum()
    t, c = (grad_B @ A).square().sum(), (B.mT @ grad_B).square().sum()
    assert p * t < q * c
    alpha, beta, kind = solved(A, B, G)
    assert kind == "scalar"
    assert alpha.unique().numel() == beta.unique().numel() == 1
    floor = FLOOR * ((beta[0] * A.norm()) ** 2 / 2).sqrt()
    torch.testing.assert_close(alpha[0] * B.norm(), floor, rtol=1e-6, atol=0)
    torch.testing.assert_close(beta.square(), (q / t / (L * LR)).expand(3), rtol=1e-9, atol=0)
    best = objective(A, B, G, alpha, beta)
    worse = [torch.cat([alpha * factor, beta]) for factor in (10, 100, 1000)]
    assert (_many(A, B, G, torch.stack(worse)) > best).all()


def test_neither_the_scale_of_the_loss_nor_a_batch_changes_anything():
    A, B, G = pair(3, batch=(3, 2))
    alpha, beta, kinds = solved(A, B, G)
    assert alpha.shape == beta.shape == (3, 2, RANK)
    assert isinstance(kinds, tuple)
    for index, kind in enumerate(kinds):
        i, j = divmod(index, 2)
        one = solved(A[i, j], B[i, j], 1e-20 * G[i, j])
        torch.testing.assert_close(one[0], alpha[i, j], rtol=1e-9, atol=0)
        torch.testing.assert_close(one[1], beta[i, j], rtol=1e-9, atol=0)
        assert one[2] == kind


def test_a_scale_of_the_adapter_can_be_absorbed_or_given():
    s = 0.3
    A, B, G = pair(COLUMN[0])
    given = solved(A, B, G, scaling=s)
    root = math.sqrt(s)
    grad_A, grad_B = (grad / root for grad in gradients(A, B, G, s))
    # Steps of size η on the factors are steps of size s η on the absorbed ones.
    absorbed = column_scaling(root * A, root * B, grad_A, grad_B, lipschitz=L, lr=s * LR)
    torch.testing.assert_close(given[0], absorbed[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(given[1], absorbed[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("zero", ["A", "B", "gradient"])
def test_without_a_direction_nothing_is_scaled(zero: str):
    A, B, G = pair(0)
    {"A": A, "B": B, "gradient": G}[zero].zero_()
    alpha, beta, kind = solved(A, B, G)
    assert kind == "none"
    assert torch.equal(alpha, torch.ones(RANK, dtype=torch.float64))
    assert torch.equal(beta, torch.ones(RANK, dtype=torch.float64))


def test_a_zero_column_stays_and_the_others_are_still_best():
    A, B, G = pair(COLUMN[0])
    B[:, 1] = 0
    alpha, beta, kind = solved(A, B, G)
    assert alpha[1] == 1
    assert kind == "column"
    best = objective(A, B, G, alpha, beta)
    noise = torch.randn(
        5000, 2 * RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert _many(A, B, G, torch.cat([alpha, beta]) * (1 + 0.1 * noise).abs()).min() >= best


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank_of_gradient", [1, 2, 5])
def test_factors_or_gradients_of_low_rank_give_finite_positive_numbers(
    rank_of_gradient: int, dtype: torch.dtype
):
    """The system is singular then."""
    A, B, G = pair(5, rank_of_gradient=rank_of_gradient)
    B[:, 2] = B[:, 0] * 2
    A[3] = A[1]
    grad_A, grad_B = gradients(A, B, G)
    cast = [each.to(dtype) for each in (A, B, grad_A, grad_B)]
    alpha, beta, kind = column_scaling(*cast, lipschitz=L, lr=LR)
    both = torch.cat([alpha, beta])
    assert both.isfinite().all()
    assert (both > 0).all()
    assert kind != "none"
    one = torch.ones(RANK, dtype=torch.float64)
    assert objective(A, B, G, alpha.double(), beta.double()) < objective(A, B, G, one, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_factors_are_solved_for_in_float64(dtype: torch.dtype):
    A, B, G = pair(COLUMN[1])
    exact = solved(A, B, G)
    grad_A, grad_B = gradients(A, B, G)
    cast = [each.to(dtype) for each in (A, B, grad_A, grad_B)]
    alpha, beta, kind = column_scaling(*cast, lipschitz=L, lr=LR)
    assert alpha.dtype == beta.dtype == torch.float32
    assert kind == "column"
    # What is left is the rounding of the factors themselves, times the condition of the system.
    tolerance = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(alpha.double(), exact[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(beta.double(), exact[1], rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"lipschitz": -1.0}, "lipschitz must be a positive number"),
        ({"lipschitz": math.nan}, "lipschitz must be a positive number, got nan"),
        ({"grad_A": torch.ones(RANK, IN + 1)}, r"lora_A must be \(\*batch, r, in\)"),
        ({"lora_B": torch.ones(OUT, RANK + 1)}, r"got \(4, 17\), \(23, 5\)"),
    ],
)
def test_bad_input_is_told(change: dict[str, object], message: str):
    A, B, G = pair(0)
    grad_A, grad_B = gradients(A, B, G)
    given = {"lora_A": A, "lora_B": B, "grad_A": grad_A, "grad_B": grad_B}
    with pytest.raises(ValueError, match=message):
        column_scaling(**{**given, "lipschitz": L, "lr": LR, **change})
