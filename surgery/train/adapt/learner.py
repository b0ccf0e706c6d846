"""A model with an inner loop: what the meta-training trains, and what adapts to a task after it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from surgery import mirrors
from surgery.errors import ConfigError, DataError, ModelStateError, NoMatch, TrainingError
from surgery.sources.libraries import BUILD_ERRORS
from surgery.train.adapt.estimators import (
    Bayesian,
    Binomial,
    Estimate,
    Estimator,
    FirstOrder,
    Implicit,
    Solved,
    Truncated,
    Unrolled,
)
from surgery.train.adapt.functional import bound, check_functional, episode_mode, refusing
from surgery.train.adapt.inner import Meta, Problem, Task, Tensors, Trace
from surgery.train.adapt.rules import RULES
from surgery.train.adapt.targets import Target, build_target
from surgery.train.adapt.tasks.episodes import QUERY, SUPPORT
from surgery.train.finetune.assembly import chosen
from surgery.train.objectives.base import first_line, placement
from surgery.tree import named_parameters

if TYPE_CHECKING:
    from surgery.rules import Where
    from surgery.train.adapt.config import AdaptConfig, EstimatorConfig
    from surgery.train.data.base import Facts

Batch = Mapping[str, Tensor]

#: What mapping may change of a meta-gradient by rounding, in float32, of its largest value.
_MAPPED_APART = 1e-2


@dataclass(frozen=True)
class Names:
    """Which parameters of a model are what.

    Attributes:
        adapted: Those that the inner loop moves.
        others: Those that are meta-learned and the same for all tasks.
    """

    adapted: tuple[str, ...]
    others: tuple[str, ...]


class Learner:
    """A model, its inner loop, and what is meta-learned beside the model.

    Args:
        config: The configuration.
        facts: What the data is.
        model: The plain model; what requires gradients is meta-learned.
        example: A batch of tasks, on which everything is tried.

    Attributes:
        model: The model.
        names: Which of its parameters are what.
        extra: What is meta-learned beside it: step sizes, variances of a prior.
        problem: Loss and step rule.
        estimator: Of the meta-gradient.
        target: What tasks ask for.

    Raises:
        ModelStateError: the model does not fit the tasks, is no function of its parameters, cannot
            be mapped over tasks, or has a parameter that gets no gradient.
        NoMatch: ``inner.where`` selects nothing that is trained.
    """

    def __init__(self, config: AdaptConfig, facts: Facts, model: nn.Module, example: Batch) -> None:
        device, dtype = placement(model)
        self.model = model
        self.config = config
        self.extra: dict[str, nn.Parameter] = {}
        self._facts = facts
        self.names = _names(model, config.inner.where)
        self.estimator = build_estimator(config.estimator)
        self._check_mirrors()
        rule = RULES[config.inner.rule](config.inner.lr)
        task = one(split({n: t.to(device) for n, t in example.items()}, dtype), 0)
        self._like = {
            name: (t.shape[1:], t.is_floating_point()) for name, t in task.support.items()
        }
        self.target: Target = build_target(config.objective, facts, model, task.support)
        # Without maps there is no need to look for them in every step.
        primal = self._primal if mirrors.attached(model) else dict
        self.problem = Problem(self._loss, rule, config.inner.steps, primal, config.inner.proximal)
        start = self.meta().start
        learned = {**rule.learned(start), **self.estimator.learned(start, config.seed)}
        self.extra = {name: nn.Parameter(value) for name, value in learned.items()}
        self._try(task)

    def meta(self) -> Meta:
        """What is meta-learned, as it is now, without gradients."""
        parameters = dict(named_parameters(self.model))
        return Meta(
            {name: parameters[name].detach() for name in self.names.adapted},
            {name: parameters[name].detach() for name in self.names.others},
            {name: value.detach() for name, value in self.extra.items()},
        )

    def parameters(self) -> list[nn.Parameter]:
        """What is meta-learned, in the order of ``meta``."""
        parameters = dict(named_parameters(self.model))
        names = (*self.names.adapted, *self.names.others)
        return [*(parameters[name] for name in names), *self.extra.values()]

    @contextmanager
    def mode(self, *, training: bool) -> Generator[None]:
        """The model as the inner loop needs it.

        Args:
            training: Whether dropout is on if the configuration asks for it.
        """
        inner = self.config.inner
        with episode_mode(self.model, inner.statistics, dropout=training and inner.dropout):
            yield

    def estimated(self, batch: Batch) -> Estimate:
        """The mean meta-gradient of a batch of tasks; losses (B,) and traces (B, K) of each."""
        tasks = split(batch, placement(self.model)[1])
        with self.mode(training=True):
            if self.config.inner.parallel == "vmap":
                return self._mapped(tasks)
            return self._looped(tasks)

    def measured(self, batch: Batch, steps: Iterable[int]) -> Tensor:
        """Measures after some numbers of inner steps: (B, len(steps) · measures)."""
        tasks, wanted = split(batch, placement(self.model)[1]), tuple(steps)
        meta = self.meta()

        def measure(task: Task) -> Tensor:
            states = self.estimator.adapted(self.problem, meta, task.support, max(wanted))
            found = (self.predicted(meta, states[k], task) for k in wanted)
            return torch.cat([self.target.measured(each, task.query) for each in found])

        with torch.no_grad(), self.mode(training=False):
            if self.config.inner.parallel == "vmap":
                return torch.func.vmap(measure, randomness="different")(tasks)
            return torch.stack([measure(one(tasks, i)) for i in range(count(tasks))])

    def traced(self, batch: Batch, index: int, steps: int) -> Trace:
        """What the inner loop of one task of a batch sees, without dropout."""
        task = one(split(batch, placement(self.model)[1]), index)
        with torch.no_grad(), self.mode(training=False):
            return self.estimator.walked(self.problem, self.meta(), task.support, steps)[1]

    def adapt(self, support: Batch, steps: int | None = None) -> Adapted:
        """Fit the model to a task.

        Args:
            support: Samples by name, (N, ...) each.
            steps: Inner steps; those of the configuration by default.

        Returns:
            The adapted parameters; the model itself stays as it is.

        Raises:
            ConfigError: ``steps`` is negative.
            DataError: these are not samples as those of the tasks.
            TrainingError: the inner loop diverges; with the step and the norm.
        """
        steps = self.problem.steps if steps is None else steps
        if steps < 0:
            raise ConfigError(f"steps is {steps}", hint="0 for none, or leave it out")
        given = self.given(support, self._like)
        self.target.check(given)
        meta = self.meta()
        with torch.no_grad(), self.mode(training=False), refusing(self.model):
            states, trace = self.estimator.walked(self.problem, meta, given, steps)
        state = states[-1]
        broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
        if broken or trouble(trace) is not None:
            seen = trouble(trace) or f"after inner step {steps}: {broken[0]} is not finite"
            raise TrainingError(
                f"the inner loop diverged {seen}", hint="lower inner.lr or the number of steps"
            )
        return Adapted(self, meta, state)

    @property
    def sample_names(self) -> tuple[str, ...]:
        """What samples of a task have."""
        return tuple(self._like)

    def given(self, samples: Batch, names: Iterable[str]) -> Tensors:
        """Samples of a caller where the model is, and in its dtype.

        Args:
            samples: By name, (N, ...) each.
            names: Which are needed; others are left out.

        Raises:
            DataError: one is missing or of another shape, or there are none.
        """
        found = {name: self._one_given(samples, name) for name in names}
        counts = {name: len(tensor) for name, tensor in found.items()}
        if len({*counts.values()}) > 1 or 0 in counts.values():
            listed = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise DataError(f"expected one or more samples, as many of each; received {listed}")
        return found

    def _one_given(self, samples: Batch, name: str) -> Tensor:
        if name not in samples:
            raise DataError(
                f"{name} is missing from the samples, which have {', '.join(samples) or 'nothing'}",
                hint=f"samples of these tasks have {', '.join(self._like)}",
            )
        tensor = samples[name]
        if not isinstance(cast("object", tensor), Tensor):
            raise DataError(f"{name} is {type(tensor).__name__}, expected a tensor")
        shape, floating = self._like[name]
        # Images and texts may be of another size, if the model can take it. What is compared with
        # predictions may not: it would be broadcast.
        fits = tensor.dim() == len(shape) + 1
        if not fits or (name == self.target.answer and tensor.shape[1:] != shape):
            expected = ", ".join(["N", *map(str, shape)]) + ("," if not shape else "")
            raise DataError(f"{name} has the shape {tuple(tensor.shape)}, expected ({expected})")
        device, dtype = placement(self.model)
        return tensor.to(device, dtype if floating else tensor.dtype)

    def predicted(self, meta: Meta, state: Tensors, task: Task) -> Tensor:
        """Predictions of an adapted state for a task's query set; within ``mode``."""

        def predict(values: Tensors) -> Tensor:
            return self.called(values, task)

        return self.estimator.predicted(self.problem, meta, state, predict, self.target.averaged)

    def called(self, values: Tensors, task: Task) -> Tensor:
        """Predictions of the model with some values for a task's query set; within ``mode``."""
        return self.target.predict(bound(self.model, values), task.query)

    def _mapped(self, tasks: Task) -> Estimate:
        meta = self.meta()

        def estimate(task: Task) -> Estimate:
            return self.estimator(self.problem, meta, task)

        found = Estimate(*torch.func.vmap(estimate, randomness="different")(tasks))
        gradient = Meta(*found.gradient).map(lambda each: each.mean(0))
        return found._replace(gradient=gradient, solved=Solved(*found.solved))

    def _looped(self, tasks: Task) -> Estimate:
        meta, tasks_in_all = self.meta(), count(tasks)
        total = meta.map(torch.zeros_like)
        losses, traces, solved = list[Tensor](), list[Trace](), list[Solved]()
        for i in range(tasks_in_all):
            found = self.estimator(self.problem, meta, one(tasks, i))
            for sums, part in zip(total, found.gradient, strict=True):
                for name, value in part.items():
                    sums[name] += value / tasks_in_all
            losses.append(found.loss)
            traces.append(found.trace)
            solved.append(found.solved)
        trace = Trace(*(torch.stack([each[i] for each in traces]) for i in range(2)))
        how = Solved(*(torch.stack([each[i] for each in solved]) for i in range(2)))
        return Estimate(total, torch.stack(losses), trace, how)

    def _loss(self, values: Tensors, samples: Tensors) -> Tensor:
        forward = bound(self.model, values)
        return self.target.loss(self.target.predict(forward, samples), samples)

    def _primal(self, values: Tensors) -> Tensors:
        return mirrors.primal(self.model, values)

    def _check_mirrors(self) -> None:
        if isinstance(self.estimator, Implicit | Bayesian) and mirrors.attached(self.model):
            raise ModelStateError(
                f"estimator {self.config.estimator.name} is of gradient descent, and the model has "
                "mirror maps: where mirror descent comes to rest is no minimum of a pulled loss",
                hint="use unrolled, truncated, binomial or first-order",
            )

    def _try(self, task: Task) -> None:
        """Run everything once on a task, to say what does not work before training."""
        inner, meta = self.config.inner, self.meta()
        for training in (False, True) if inner.dropout else (False,):
            with self.mode(training=training), refusing(self.model):
                check_functional(
                    self.model, lambda: self.problem.query(meta.others, meta.start, task)
                )
        with self.mode(training=True):
            with refusing(self.model):
                self._check_gradients(task)
            if inner.parallel == "vmap":
                self._check_mapped(task)

    def _check_gradients(self, task: Task) -> None:
        """Refuse what the query loss after a step does not depend on."""
        with torch.enable_grad():
            meta = self.meta().map(lambda value: value.clone().requires_grad_(True))
            state, _ = self.problem.unrolled(meta, meta.start, task.support, 1)
            loss = self.problem.query(meta.others, state, task)
            own = self.problem.rule.learned(meta.start)
            named = {**meta.start, **meta.others, **{n: meta.extra[n] for n in own}}
            grad = cast("Callable[..., list[Tensor | None]]", torch.autograd.grad)
            found = grad(loss, [*named.values()], allow_unused=True)
        missing = [name for name, each in zip(named, found, strict=True) if each is None]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ModelStateError(
                f"{len(missing)} meta-parameters get no gradient, since the loss of a task does "
                f"not depend on them: {listed}",
                hint="freeze them with rules, or choose what is trained with model.unfreeze",
            )

    def _check_mapped(self, task: Task) -> None:
        pair = Task(*({n: torch.stack([t, t]) for n, t in part.items()} for part in task))
        meta = self.meta()
        gradient = partial(self.problem.gradient, meta.others, meta.start, meta.start)
        try:
            torch.func.vmap(gradient, randomness="different")(pair.support)
        except BUILD_ERRORS as error:
            raise ModelStateError(
                f"{type(self.model).__name__} cannot be mapped over tasks: {first_line(error)}",
                hint="set inner.parallel: loop",
            ) from error
        if not isinstance(self.estimator, FirstOrder):
            self._check_second_order(pair)

    def _check_second_order(self, pair: Task) -> None:
        """Refuse a model of which mapping gets derivatives of derivatives wrong.

        torch 2.15 does so, without a word, for ``layer_norm`` when the derivative is taken around
        the mapping. Estimators map around the derivative, where none such is known.
        """
        problem, meta = replace(self.problem, steps=1), self.meta()

        def gradient(task: Task) -> Meta:
            return Meta(*Unrolled()(problem, meta, task).gradient)

        with self.mode(training=False):
            mapped = Meta(*torch.func.vmap(gradient, randomness="different")(pair))
            single = gradient(one(pair, 0))
        size = max(float(each.abs().max()) for part in single for each in part.values())
        for there, here in zip(mapped, single, strict=True):
            for name, right in here.items():
                apart = float((there[name] - right).abs().max())
                if apart > _MAPPED_APART * size:
                    raise ModelStateError(
                        f"{type(self.model).__name__} cannot be mapped over tasks: torch "
                        f"{torch.__version__} then gives another meta-gradient of {name}, off by "
                        f"{apart:.1e} where the largest value is {size:.1e}",
                        hint="set inner.parallel: loop, or estimator: {name: first-order}",
                    )


@dataclass(frozen=True)
class Adapted:
    """A model fitted to one task.

    Attributes:
        learner: What it was adapted with.
        meta: What it was adapted from.
        state: The adapted parameters, as the estimator keeps them.
    """

    learner: Learner
    meta: Meta
    state: Tensors

    @property
    def values(self) -> Tensors:
        """The adapted parameters as the model uses them, by name; of a posterior, its mean."""
        learner = self.learner
        if isinstance(learner.estimator, Bayesian):
            mean = learner.estimator.posterior(self.state).mean
            return learner.problem.values(self.meta.others, mean)
        return learner.problem.values(self.meta.others, self.state)

    def predict(self, samples: Batch) -> Tensor:
        """Predictions for samples (N, ...): logits (N, ways), or values (N, outputs).

        Raises:
            DataError: these are not samples as those of the tasks.
        """
        learner = self.learner
        task = self._task(samples)
        with torch.no_grad(), learner.mode(training=False), refusing(learner.model):
            return learner.predicted(self.meta, self.state, task)

    def drawn(self, samples: Batch) -> Tensor:
        """Predictions of draws from the posterior: (predictive_draws, N, ...).

        How far they lie apart is how little is known: it shrinks where the support set has samples.

        Raises:
            DataError: these are not samples as those of the tasks.
            ModelStateError: the estimator has no posterior.
        """
        learner = self.learner
        estimator = learner.estimator
        if not isinstance(estimator, Bayesian):
            raise ModelStateError(
                f"estimator {learner.config.estimator.name} has no posterior to draw from",
                hint="meta-train with estimator: {name: bayesian}",
            )
        task = self._task(samples)
        with torch.no_grad(), learner.mode(training=False), refusing(learner.model):
            return estimator.drawn(
                learner.problem, self.meta, self.state, lambda values: learner.called(values, task)
            )

    def _task(self, samples: Batch) -> Task:
        learner = self.learner
        names = [name for name in learner.sample_names if name != learner.target.answer]
        return Task({}, learner.given(samples, names))


def build_estimator(section: EstimatorConfig) -> Estimator:
    """The estimator that a configuration names."""
    if section.name == "first-order":
        return FirstOrder()
    if section.name == "truncated":
        return Truncated(section.terms)
    if section.name == "binomial":
        return Binomial(section.terms, section.side_by_side, section.scale)
    if section.name == "implicit":
        return Implicit(section.solver_steps)
    if section.name == "bayesian":
        return Bayesian(
            section.kl_weight, section.draws, section.predictive_draws, section.solver_steps
        )
    return Unrolled()


def trouble(trace: Trace) -> str | None:
    """Where an inner loop of K steps has diverged, with the norm; None if it has not.

    Args:
        trace: What it saw, (K,) each.
    """
    broken = ~(torch.isfinite(trace.losses) & torch.isfinite(trace.norms))
    if not bool(broken.any()):
        return None
    k = int(broken.int().argmax())
    loss, norm = float(trace.losses[k]), float(trace.norms[k])
    before = "" if k == 0 else f" (the step before: {float(trace.norms[k - 1]):.4g})"
    return (
        f"at inner step {k + 1} of {len(broken)}: loss {loss:.4g}, gradient norm {norm:.4g}{before}"
    )


def split(batch: Batch, dtype: torch.dtype) -> Task:
    """Support and query sets of a batch; floating-point samples as the model's weights are."""
    parts = (
        {name.removeprefix(p): t for name, t in batch.items() if name.startswith(p)}
        for p in (SUPPORT, QUERY)
    )
    return Task(*(_cast(part, dtype) for part in parts))


def one(tasks: Task, index: int) -> Task:
    """One task of a batch."""
    return Task(*({name: tensor[index] for name, tensor in part.items()} for part in tasks))


def count(tasks: Task) -> int:
    """Tasks in a batch."""
    return len(next(iter(tasks.support.values())))


def _cast(samples: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in samples.items()}


def _names(model: nn.Module, where: Where | None) -> Names:
    # A tied parameter by one of its names: functional_call puts a value in under all of them.
    named = named_parameters(model, duplicates=False)
    trained = {name: p for name, p in named if p.requires_grad}
    of_maps = {name for each in mirrors.attached(model) for name in each.map_parameters}
    movable = {name: p for name, p in trained.items() if name not in of_maps}
    wanted = None if where is None else {id(p) for p in chosen(model, where, "inner.where")}
    adapted = [n for n, p in movable.items() if wanted is None or id(p) in wanted]
    if not adapted:
        raise NoMatch(
            "no parameter of the model is trained, so that nothing can adapt"
            if where is None
            else f"inner.where {where.dump()} selects nothing that is trained",
            hint="name modules whose parameters require gradients, such as {role: head}",
        )
    return Names(tuple(adapted), tuple(name for name in trained if name not in set(adapted)))
