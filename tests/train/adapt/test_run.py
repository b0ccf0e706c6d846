"""Adaptations from a configuration to a run folder, and what stops them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import surgery
from surgery import shipped
from surgery.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelStateError,
    NoMatch,
    SurgeryError,
    TrainingError,
)
from surgery.train import checkpoints
from surgery.train.adapt import objective
from surgery.train.adapt.config import AdaptConfig
from surgery.train.adapt.estimators import Estimate, FirstOrder
from surgery.train.adapt.functional import check_functional, episode_mode
from surgery.train.adapt.inner import Meta, Problem, Task
from surgery.train.adapt.learner import Learner
from surgery.train.adapt.objective import MetaObjective, example_of
from surgery.train.adapt.run import EXTRA, Adapting, adapt, learner
from surgery.train.adapt.tasks import open_tasks
from surgery.train.data.base import Place
from tests.train import tiny as plain
from tests.train.adapt import tiny

ESTIMATORS: dict[str, tuple[str, ...]] = {
    "unrolled": ("inner.rule=per-parameter",),
    "first-order": ("inner.rule=preconditioned",),
    "truncated": ("estimator.terms=2",),
    "binomial": ("estimator.terms=2", "inner.rule=per-parameter"),
    "implicit": ("inner.proximal=1.0",),
    "bayesian": ("estimator.draws=2", "inner.lr=0.01"),
}


def of(name: str, *overrides: str) -> AdaptConfig:
    """A tiny run with an estimator."""
    options = [_json(each) for each in ESTIMATORS[name]]
    return tiny.sinusoid(f'estimator={{"name": "{name}"}}', *options, *overrides)


def _json(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={json.dumps(value) if value[0].isalpha() else value}"


def same_files(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_resumed_run_is_the_whole_one_in_every_bit(name: str, tmp_path: Path):
    config = of(name)
    whole, out = tmp_path / "whole", tmp_path / "run"
    done = adapt(config, out=whole)
    assert done.evaluation.keys() == {"loss", "loss@0", "loss@5"}
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    (out / EXTRA).unlink(missing_ok=True)
    for path in checkpoints.complete(out / "checkpoints"):
        if path.name != "step-000002":
            shutil.rmtree(path)
    adapt(config, out=out, resume=True)
    assert plain.log(out) == plain.log(whole)
    assert same_files(out / "model" / "model.safetensors", whole / "model" / "model.safetensors")
    learned = name in ("unrolled", "first-order", "binomial", "bayesian")
    assert (whole / EXTRA).exists() == learned
    if learned:
        assert same_files(out / EXTRA, whole / EXTRA)
        start = learner_of(config).extra
        moved = load_file(whole / EXTRA)
        assert all(not torch.equal(moved[n], p.detach()) for n, p in start.items())


def learner_of(config: AdaptConfig) -> Learner:
    job = Adapting(config)
    data = job.data()
    return Learner(config, data.facts, job.model(data), example_of(data))


def test_mapped_tasks_are_looped_tasks(tmp_path: Path):
    runs = [
        adapt(of("unrolled", f'inner.parallel="{how}"'), out=tmp_path / how)
        for how in ("loop", "vmap")
    ]
    # Batched matrix products round differently: float32 through three inner and six outer steps.
    losses = [plain.losses(run.out) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_gradient_of_the_loss_is_the_estimators():
    config = of("binomial")
    made = learner_of(config)
    aim = MetaObjective(made)
    batch = open_tasks(config.data, seed=0).train.batch([Place(0, 0), Place(0, 1)])
    expected = made.estimated(batch)
    loss = aim.loss(made.model, batch, step=1)
    assert loss.detach() == pytest.approx(float(expected.loss.mean()))
    (0.5 * loss).backward()
    flat = [value for part in expected.gradient for value in part.values()]
    for parameter, gradient in zip(made.parameters(), flat, strict=True):
        assert torch.equal(parameter.grad, 0.5 * gradient)


def test_meta_training_pays():
    """Sine waves are met better after 5 steps than before training could."""
    config = tiny.sinusoid(
        'model.config={"width": 24}',
        "train.steps=150",
        "train.batch=10",
        'inner.parallel="vmap"',
        "evaluate.every=150",
        "evaluate.samples=50",
        "checkpoint.every=150",
        "data.shots=10",
    )
    job = Adapting(config)
    before = MetaObjective(learner_of(config)).evaluate(nn.Identity(), [held_out(job)])
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        after = adapt(config, out=Path(folder) / "run").evaluation
    assert after["loss"] < 0.7 * before["loss"]
    assert after["loss"] < after["loss@0"]


def held_out(job: Adapting) -> dict[str, Tensor]:
    return job.data().held_out.batch([Place(i, i) for i in range(50)])


def test_digits_from_classes_never_seen(tmp_path: Path):
    run = adapt(
        tiny.digits(
            "train.steps=2", "evaluate.samples=3", 'estimator={"name": "binomial", "terms": 1}'
        ),
        out=tmp_path / "run",
    )
    assert {"loss", "accuracy", "confidence", "accuracy@0", "accuracy@5"} <= run.evaluation.keys()
    assert 0 <= run.evaluation["accuracy"] <= 1
    again = learner(run.out)
    data = open_tasks(again.config.data, seed=0)
    task = data.held_out.sample(0, 0)
    support = {n.removeprefix("support."): t for n, t in task.items() if n.startswith("support.")}
    before = {n: p.detach().clone() for n, p in again.model.named_parameters()}
    adapted = again.adapt(support)
    logits = adapted.predict({"images": task["query.images"]})
    assert logits.shape == (6, 3)
    # An independent inner loop, by autograd on the model itself.
    expected = by_hand(again.model, support, task["query.images"], steps=2, lr=0.05)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in again.model.named_parameters())
    assert adapted.values.keys() == before.keys()


def by_hand(
    model: nn.Module, support: dict[str, Tensor], images: Tensor, *, steps: int, lr: float
) -> Tensor:
    import copy

    model = copy.deepcopy(model).train()
    for _ in range(steps):
        loss = F.cross_entropy(model(support["images"]), support["labels"])
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(lr * parameter.grad)
    with torch.no_grad():
        return model(images)


def test_the_uncertainty_of_a_posterior(tmp_path: Path):
    run = adapt(of("bayesian", "train.steps=2"), out=tmp_path / "run")
    again = learner(run.out)
    task = again_task(again)
    adapted = again.adapt(task)
    estimator: Any = again.estimator
    posterior = estimator.posterior(adapted.state)
    assert posterior.mean.keys() == dict(again.model.named_parameters()).keys()
    assert all(bool((v > 0).all()) for v in posterior.variance.values())
    one, two = adapted.predict(task), adapted.predict(task)
    assert not torch.equal(one, two), "predictions are of draws"
    assert torch.allclose(one, two, atol=0.5)
    assert torch.equal(adapted.values["head.bias"], posterior.mean["head.bias"])


SAMPLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no targets": (lambda t: {"inputs": t["inputs"]}, "targets is missing .* which have inputs"),
    "targets of one axis": (
        lambda t: {**t, "targets": t["targets"][:, 0]},
        r"targets has the shape \(4,\), expected \(N, 1\)",
    ),
    "of another width": (
        lambda t: {**t, "targets": t["targets"].expand(-1, 2)},
        r"targets has the shape \(4, 2\), expected \(N, 1\)",
    ),
    "too few targets": (
        lambda t: {**t, "targets": t["targets"][:2]},
        "received 4 inputs, 2 targets",
    ),
    "nothing": (lambda t: {n: each[:0] for n, each in t.items()}, "0 inputs, 0 targets"),
    "an array": (lambda t: {n: each.numpy() for n, each in t.items()}, "is ndarray, expected"),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_that_are_none_are_refused(case: str):
    made = learner_of(tiny.sinusoid())
    change, message = SAMPLES[case]
    with pytest.raises(DataError, match=message):
        made.adapt(change(again_task(made)))


def test_more_that_cannot_be_adapted_to_is_refused():
    made = learner_of(tiny.sinusoid())
    task = again_task(made)
    with pytest.raises(ConfigError, match="steps is -1"):
        made.adapt(task, steps=-1)
    adapted = made.adapt(task)
    with pytest.raises(DataError, match="inputs is missing"):
        adapted.predict({"x": task["inputs"]})
    with pytest.raises(ModelStateError, match=r"layers\.0 \(Linear\) does not work"):
        adapted.predict({"inputs": torch.ones(2, 3)})
    with pytest.raises(ModelStateError, match="estimator unrolled has no posterior"):
        adapted.drawn(task)
    whole = made.adapt({n: t.long() for n, t in task.items()})
    assert torch.equal(
        whole.state["head.bias"],
        made.adapt({n: t.long().float() for n, t in task.items()}).state["head.bias"],
    )


def test_labels_out_of_range_are_refused():
    made = learner_of(tiny.digits())
    images = torch.zeros(3, 1, 16, 16)
    for labels in (torch.tensor([0, 1, 3]), torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(DataError, match=r"expected torch\.int64 from 0 to 2"):
            made.adapt({"images": images, "labels": labels})


def test_draws_of_a_posterior():
    made = learner_of(of("bayesian", "estimator.predictive_draws=3"))
    task = again_task(made)
    assert made.adapt(task, steps=0).drawn(task).shape == (3, 4, 1)


@pytest.mark.parametrize(("steps", "said"), [(1, True), (60, False)])
def test_an_implicit_gradient_that_is_biased_says_so_once(
    steps: int, said: bool, caplog: pytest.LogCaptureFixture
):
    options = (f"inner.steps={steps}", "inner.lr=0.003", "inner.proximal=30.0")
    made = learner_of(of("implicit", *options))
    aim, batch = MetaObjective(made), example_of(Adapting(made.config).data())
    for step in (1, 2):
        aim.loss(made.model, batch, step=step)
    told = [each.getMessage() for each in caplog.records if each.name == objective.__name__]
    assert len(told) == said
    assert all("step 1: the implicit meta-gradient is biased, since" in each for each in told)
    assert all("has not come to rest" in each for each in told)


def with_adapters(method: str) -> AdaptConfig:
    rule = {"pass": "lowrank", "with": {"method": method, "rank": 2}}
    return tiny.sinusoid(
        f"rules={json.dumps({'version': 1, 'rules': [rule]})}", 'inner.rule="per-parameter"'
    )


def test_rules_of_adapters_are_around_the_meta_steps(tmp_path: Path):
    from surgery.optim.rule import rules_of

    job = Adapting(with_adapters("reflora"))
    data = job.data()
    model = job.model(data)
    job.objective(data, model)
    optimizer = job.optimizer(model)
    job.prepared(model, optimizer)
    assert [type(rule).__name__ for rule in rules_of(optimizer)] == ["RefLoRA"]
    assert job.penalty(model) is None
    run = adapt(job.config, out=tmp_path / "run")
    learner(run.out)


def test_a_methods_penalty_is_part_of_the_meta_loss():
    job = Adapting(with_adapters("sorsa"))
    model = job.model(job.data())
    job.prepared(model, torch.optim.SGD(model.parameters(), lr=0.1))
    penalty = job.penalty(model)
    assert penalty is not None
    assert penalty.requires_grad


def again_task(made: Learner) -> dict[str, Tensor]:
    sample = open_tasks(made.config.data, seed=0).held_out.sample(0, 0)
    return {n.removeprefix("support."): t for n, t in sample.items() if n.startswith("support.")}


def test_only_what_is_chosen_adapts(tmp_path: Path):
    config = tiny.sinusoid('inner.where={"path": "head"}')
    made = learner_of(config)
    assert made.names.adapted == ("head.weight", "head.bias")
    assert len(made.names.others) == 4
    adapted = made.adapt(again_task(made))
    before = dict(made.model.named_parameters())
    assert {n for n, v in adapted.values.items() if not torch.equal(v, before[n])} == {
        "head.weight",
        "head.bias",
    }
    run = adapt(config, out=tmp_path / "run")
    trained = load_file(run.model / "model.safetensors")
    assert not torch.equal(trained["layers.0.weight"], before["layers.0.weight"])


def test_the_command_line(tmp_path: Path):
    from surgery.cli import app

    file = tmp_path / "tiny.yaml"
    file.write_text(tiny.sinusoid().to_yaml())
    command = ["adapt", str(file), "train.steps=2", "--out", str(tmp_path / "run"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 2
    assert (tmp_path / "run" / "plots" / "losses.png").exists()
    surgery.restore(tmp_path / "run" / "model")


@pytest.mark.parametrize("name", shipped.adaptations())
def test_shipped_configurations_are_read(name: str):
    config = AdaptConfig.load(shipped.adaptations()[name])
    assert config.name == name
    assert AdaptConfig.parse(config.dump()) == config


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["loop", "vmap"])
def test_an_inner_loop_that_diverges_stops_with_step_and_norm(parallel: str, tmp_path: Path):
    config = tiny.sinusoid("inner.lr=1e30", "inner.steps=4", f'inner.parallel="{parallel}"')
    message = (
        r"step 1: the inner loop of task \d diverged at inner step \d of 4: loss (nan|inf).*norm"
    )
    with pytest.raises(TrainingError, match=message):
        adapt(config, out=tmp_path / "run")


HELD_OUT = r"loop of held-out task 0 diverged at inner step 2 of 5: loss inf, gradient norm nan"
ADAPTING = r"the inner loop diverged at inner step 2 of 6: loss inf, gradient norm nan \(the step"


def test_a_held_out_inner_loop_that_diverges_stops(tmp_path: Path):
    made = learner_of(tiny.sinusoid("inner.lr=1e30"))
    batch = open_tasks(made.config.data, seed=0).held_out.batch([Place(0, 0)])
    with pytest.raises(TrainingError, match=HELD_OUT):
        MetaObjective(made).evaluate(made.model, [batch])


def test_adapting_that_diverges_stops():
    made = learner_of(tiny.sinusoid("inner.lr=1e30"))
    with pytest.raises(TrainingError, match=ADAPTING):
        made.adapt(again_task(made), steps=6)


class Writes(nn.Module):
    """A linear layer that counts its calls in a way of its choice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.how = how
        self.register_buffer("calls", torch.zeros(()))
        self.kept = torch.zeros(())
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.calls.add_(1)
        elif self.how == "replaced":
            self.calls = self.calls + 1
        elif self.how == "plain attribute":
            self.kept = x.detach().mean()
        elif self.how == "filled once" and self.cache is None:
            self.cache = torch.ones(())
        elif self.how == "in train mode only" and self.training:
            self.calls.add_(1)
        elif self.how == "in a dict":
            self.dict = {"mean": x.detach().mean()}
        elif self.how == "parameter":
            with torch.no_grad():
                self.inner.weight.clamp_(-1, 1)
        return self.inner(x)


WRITTEN = {
    "in place": r"1 \(Writes\) writes its tensor 'calls'",
    "replaced": r"1 \(Writes\) writes its tensor 'calls'",
    "plain attribute": r"1 \(Writes\) writes its tensor 'kept'",
    "in a dict": r"1 \(Writes\) writes its tensor \"dict\['mean'\]\"",
    "parameter": r"1\.inner \(Linear\) writes its tensor 'weight'",
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_model_that_writes_is_refused_with_the_modules_name(how: str):
    model = nn.Sequential(nn.Linear(1, 1), Writes(how))
    with (
        episode_mode(model, "episode", dropout=False),
        pytest.raises(ModelStateError, match=WRITTEN[how]),
    ):
        check_functional(model, lambda: model(torch.ones(2, 1)))


def test_what_is_written_in_train_mode_goes_without_dropout_only():
    model = nn.Sequential(nn.Linear(1, 1), Writes("in train mode only"))
    learner_with(model)
    with pytest.raises(
        ModelStateError, match=r"1 \(Writes\) writes its .*\n.*leave inner\.dropout"
    ):
        learner_with(model, "inner.dropout=true")


def test_a_module_that_cannot_be_differentiated_is_named():
    class Sets(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.clamp(-1, 1)
            return super().forward(x)

    with pytest.raises(
        ModelStateError, match=r"1 \(Sets\) does not work in an inner loop: mutating"
    ):
        learner_with(nn.Sequential(nn.Linear(1, 1), Sets(1, 1)))


def test_a_batch_norm_with_one_sample_is_named():
    model = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    one = tiny.sinusoid('data={"kind": "sinusoid", "shots": 1, "queries": 2}')
    data = Adapting(one).data()
    with pytest.raises(
        ModelStateError, match=r"1 \(BatchNorm1d\) does not work.*more than 1 value"
    ):
        Learner(one, data.facts, model, example_of(data))


class Kinked(nn.Module):
    """Has a slope at its start, and no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.zeros(1))
        self.inner = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.power.abs() ** 1.5 * x


@pytest.mark.parametrize("parallel", ["loop", "vmap"])
def test_a_meta_gradient_that_is_not_finite_stops_with_the_parameter(parallel: str):
    made = learner_with(Kinked(), 'estimator={"name": "binomial", "terms": 1}')
    mapped = made.config.inner.model_copy(update={"parallel": parallel})
    made.config = made.config.model_copy(update={"inner": mapped})
    aim, batch = MetaObjective(made), example_of(Adapting(made.config).data())
    with pytest.raises(TrainingError, match=r"step 3: the meta-gradient of power is not finite"):
        aim.loss(made.model, batch, step=3)


class Steep(FirstOrder):
    """Its gradients are finite, and the sum of their squares is not."""

    def __call__(self, problem: Problem, meta: Meta, task: Task) -> Estimate:
        found = super().__call__(problem, meta, task)
        return found._replace(gradient=found.gradient.map(lambda value: 0 * value + 1e25))


@pytest.mark.parametrize("parallel", ["loop", "vmap"])
def test_a_meta_gradient_whose_norm_overflows_stops_with_its_largest_entry(parallel: str):
    made = learner_with(Tied(), f'inner.parallel="{parallel}"')
    made.estimator = Steep()
    aim, batch = MetaObjective(made), example_of(Adapting(made.config).data())
    told = r"step 3: .* its norm overflows, and the largest entry, of first\.weight, is 1e\+25"
    with pytest.raises(TrainingError, match=told):
        aim.loss(made.model, batch, step=3)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("parallel", ["loop", "vmap"])
def test_tied_parameters_adapt_as_one(parallel: str):
    made = learner_with(Tied(), f'inner.parallel="{parallel}"')
    assert made.names.adapted == ("first.weight", "first.bias", "second.bias")
    task = again_task(made)
    by_itself = Tied()
    by_itself.load_state_dict(made.model.state_dict())
    for _ in range(3):
        loss = F.mse_loss(by_itself(task["inputs"]), task["targets"])
        found = torch.autograd.grad(loss, [*by_itself.parameters()])
        with torch.no_grad():
            for parameter, gradient in zip(by_itself.parameters(), found, strict=True):
                parameter.sub_(0.05 * gradient)
    found = made.adapt(task).predict({"inputs": task["inputs"]})
    assert torch.allclose(found, by_itself(task["inputs"]), rtol=1e-5, atol=1e-6)
    assert len(made.estimated(example_of(Adapting(made.config).data())).gradient.start) == 3


@pytest.mark.parametrize("how", ["nothing", "filled once", "in train mode only"])
def test_a_model_that_writes_nothing_lasting_is_taken(how: str):
    model = nn.Sequential(Writes(how), nn.BatchNorm1d(1), nn.Dropout())
    with episode_mode(model, "episode", dropout=False):
        check_functional(model, lambda: model(torch.ones(2, 1)))


def changed_model(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], nn.Module]
) -> None:
    from surgery.train.adapt import run

    build = run.build

    def changed(config: Any, data: Any) -> Any:
        from dataclasses import replace

        built = build(config, data)
        return replace(built, model=change(built.model))

    monkeypatch.setattr(run, "build", changed)


def test_a_run_names_the_module_that_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    changed_model(monkeypatch, lambda model: nn.Sequential(model, Writes("in place")))
    with pytest.raises(ModelStateError, match=r"1 \(Writes\) writes its tensor 'calls'"):
        adapt(tiny.sinusoid(), out=tmp_path / "run")


def test_meta_parameters_without_a_gradient_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def with_a_spare_layer(model: nn.Module) -> nn.Module:
        model.spare = nn.Linear(1, 1)
        return model

    changed_model(monkeypatch, with_a_spare_layer)
    with pytest.raises(
        ModelStateError, match=r"2 meta-parameters get no gradient.*: spare\.weight, spare\.bias"
    ):
        adapt(tiny.sinusoid(), out=tmp_path / "run")


class Branching(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out if bool(out.sum() > 0) else 2 * out


def test_a_model_that_cannot_be_mapped_is_refused_and_loops(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    changed_model(monkeypatch, Branching)
    with pytest.raises(ModelStateError, match="Branching cannot be mapped over tasks"):
        adapt(tiny.sinusoid('inner.parallel="vmap"'), out=tmp_path / "mapped")
    config = tiny.sinusoid()
    data = Adapting(config).data()
    made = Learner(config, data.facts, Branching(Adapting(config).model(data)), example_of(data))
    assert bool(torch.isfinite(made.estimated(example_of(data)).loss).all())


class Odd(nn.Module):
    """Computes something else when it is mapped, as a wrong rule of torch's would."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        mapped = torch._C._functorch.is_batchedtensor(x)
        return self.inner(x) * (1.5 if mapped else 1)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1))


def learner_with(model: nn.Module, *overrides: str) -> Learner:
    config = tiny.sinusoid(*overrides)
    data = Adapting(config).data()
    return Learner(config, data.facts, model, example_of(data))


def test_a_model_that_is_mapped_wrongly_is_refused():
    with pytest.raises(ModelStateError, match=r"Odd cannot be mapped over tasks: torch .* off by"):
        learner_with(Odd(), 'inner.parallel="vmap"')
    learner_with(Odd(), 'inner.parallel="loop"')


@pytest.mark.parametrize("name", ["unrolled", "binomial", "first-order"])
def test_norms_of_layers_are_mapped_rightly(name: str):
    # Mapped inside the derivative, torch 2.15 gets them wrong.
    model = normed()
    data = Adapting(tiny.sinusoid()).data()
    terms = ', "terms": 2' if name == "binomial" else ""
    estimator = f'estimator={{"name": "{name}"{terms}}}'
    wanted = learner_with(model, estimator).estimated(example_of(data)).gradient.start
    found = learner_with(model, estimator, 'inner.parallel="vmap"').estimated(example_of(data))
    for each, value in wanted.items():
        torch.testing.assert_close(found.gradient.start[each], value, rtol=1e-3, atol=1e-4)


REFUSED = {
    'estimator={"name": "binomial", "terms": 9}': "9 terms, and there are 3 inner steps",
    'estimator={"name": "implicit"}': "implicit needs the pull back to the start",
    "train.compile=true": "the inner loop is not compiled",
    "train.checkpointing=true": "cannot be differentiated twice",
    'train.precision="bf16"': "second derivatives are not taken under autocast",
    'train.on_nan="skip"': "goes on diverging",
    'train.parallel="fsdp2"': "tasks are adapted to in one process",
    'objective={"kind": "classification"}': "does not go with tasks of sinusoid data",
    'model.unfreeze={"path": "head"}': "without rules all of the model is trained",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_does_not_go_together_is_refused(override: str):
    with pytest.raises(ConfigError, match=REFUSED[override]):
        tiny.sinusoid(override)


MORE_REFUSED = {
    "implicit": ('inner.rule="per-parameter"', "does not depend on its step sizes"),
    "binomial": ("inner.proximal=1.0", "binomial is of an inner loop without a pull"),
    "bayesian": ("inner.dropout=true", "under other dropout masks"),
}


@pytest.mark.parametrize("name", MORE_REFUSED)
def test_what_an_estimator_cannot_do_is_refused(name: str):
    override, message = MORE_REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        of(name, override)


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(NoMatch, match=r"inner\.where .* selects nothing"):
        learner_of(tiny.sinusoid('inner.where={"path": "heed"}'))


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="the launcher started 2"):
        adapt(tiny.sinusoid(), out=tmp_path / "run")


def test_a_model_of_other_outputs_is_refused():
    with pytest.raises(ModelStateError, match=r"returned \(4, 3\); expected values \(4, 1\)"):
        learner_of(tiny.sinusoid('model.config={"outputs": 3}'))
    with pytest.raises(SurgeryError, match=r"has 3 classes.*returned logits \(2, 5\)"):
        learner_of(tiny.digits('model.config={"in_chans": 1, "size": 16}'))


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no run has ended there"):
        learner(tmp_path)
    run = adapt(of("unrolled", "train.steps=1"), out=tmp_path / "run")
    learned = load_file(run.out / EXTRA)
    (run.out / EXTRA).unlink()
    with pytest.raises(CheckpointError, match="is of another inner loop: 6 tensors"):
        learner(run.out)
    save_file({name: value[:1] for name, value in learned.items()}, run.out / EXTRA)
    with pytest.raises(CheckpointError, match=r"has the shape \(1,.*\) there and \(8,.*\) in this"):
        learner(run.out)


# --- mirror maps --------------------------------------------------------------------------------

MAPS = {"diagonal": {}, "legendre": {}, "block_iaf": {"blocks": 2}}


def under(name: str, *overrides: str) -> AdaptConfig:
    """Sine waves with a mirror map over every parameter."""
    rule = {"pass": "mirror", "with": {"map": name, "options": MAPS[name]}}
    rules = {"version": 1, "rules": [rule]}
    return tiny.sinusoid(f"rules={json.dumps(rules)}", 'model.dtype="float64"', *overrides)


@pytest.mark.parametrize("name", MAPS)
def test_mirror_descent_steps_on_duals_with_the_gradient_of_what_they_map_to(name: str):
    made = learner_of(under(name, "inner.steps=2"))
    disturb(made)
    task = again_task(made)
    model, maps = made.model, surgery.mirrors.attached(made.model)
    duals = [n for each in maps for n in each.parameters]
    z = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        phi = surgery.mirrors.primal(model, z)
        leaves = {n: phi[n].detach().requires_grad_(True) for n in duals}
        with surgery.mirrors.unmapped(model):
            out = torch.func.functional_call(model, {**phi, **leaves}, task["inputs"].double())
        loss = F.mse_loss(out, task["targets"].double())
        found = torch.autograd.grad(loss, [*leaves.values()])
        z |= {n: z[n] - 0.05 * g for n, g in zip(duals, found, strict=True)}
    adapted = made.adapt(task)
    for n in duals:
        assert torch.allclose(adapted.state[n], z[n].detach(), rtol=1e-12, atol=1e-14)
    expected = surgery.mirrors.primal(model, z)
    assert not torch.allclose(expected[duals[0]], z[duals[0]])
    for n in duals:
        assert torch.allclose(adapted.values[n], expected[n], rtol=1e-12, atol=1e-14)


def disturb(made: Learner) -> None:
    """Maps away from the identity, where they start."""
    draw = torch.Generator().manual_seed(0)
    parameters = dict(made.model.named_parameters())
    with torch.no_grad():
        for n in made.names.others:
            p = parameters[n]
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=draw))


@pytest.mark.parametrize("name", MAPS)
def test_the_expansion_covers_what_a_map_learns(name: str):
    """As many terms as steps are unrolling: for the duals and for every parameter of the map."""
    found = []
    for estimator in ('{"name": "unrolled"}', '{"name": "binomial", "terms": 3}'):
        made = learner_of(under(name, f"estimator={estimator}"))
        disturb(made)
        found.append(made.estimated(example_of(Adapting(made.config).data())).gradient)
    exact, ours = found
    assert exact.others
    for part, mine in zip(exact, ours, strict=True):
        for n, value in part.items():
            assert torch.allclose(mine[n], value, rtol=1e-10, atol=1e-12), n


def test_implicit_estimators_refuse_maps():
    with pytest.raises(ModelStateError, match="the model has mirror maps"):
        learner_of(under("diagonal", 'estimator={"name": "bayesian"}'))
