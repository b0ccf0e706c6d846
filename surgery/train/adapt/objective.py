"""The meta-objective: the query loss after the inner loop, with its estimated gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import CheckpointError, TrainingError
from surgery.train import randomness
from surgery.train.adapt.estimators import Bayesian, Estimate, Implicit
from surgery.train.adapt.inner import Meta, Trace
from surgery.train.adapt.learner import Batch, Learner, trouble
from surgery.train.objectives.base import POSITION, Gather, Objective, alone, measured

if TYPE_CHECKING:
    from surgery.train.data.base import Data

EVALUATION_SEED = 0
"""Draws of an evaluation are the same each time, and do not move those of the training."""

_ROUGH = 0.1
"""What an implicit gradient may be off by, as a part of a norm, before that is said."""

logger = logging.getLogger(__name__)

_CALMER = "lower inner.lr or inner.steps, or use estimator: {name: first-order}"


class MetaObjective(Objective):
    """Query loss of tasks after the inner loop.

    Args:
        learner: Model and inner loop.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        inner = learner.config.inner
        further = sorted({*learner.config.evaluate.inner_steps} - {inner.steps})
        self._steps = (inner.steps, *further)
        self._doubted = False

    def parameters(self) -> list[nn.Parameter]:
        """What is meta-learned beside the model."""
        return [*self.learner.extra.values()]

    def loss(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Mean query loss of the tasks of a batch; its gradient is the estimator's.

        Raises:
            TrainingError: an inner loop diverges, with the task, the inner step and the norm; or
                the meta-gradient is not finite, with the parameter.
        """
        found = self.learner.estimated(batch)
        self._check(found.trace, found.loss, batch, f"step {step}")
        _check_gradient(found.gradient, f"step {step}")
        self._doubt(found, step)
        gradients = [value for part in found.gradient for value in part.values()]
        parameters = self.learner.parameters()
        return _Estimated.apply(found.loss.mean(), len(gradients), *gradients, *parameters)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], *, gather: Gather = alone
    ) -> dict[str, float]:
        """Measure held-out tasks.

        Returns:
            Means over all tasks: ``loss``, and of classes ``accuracy`` and ``confidence``, after
            the inner steps of the training; ``loss@3`` after other numbers of them.
        """
        names = self.learner.target.measures

        def measure(batch: Batch) -> Tensor:
            values = self.learner.measured(batch, self._steps)
            self._check_held_out(values, batch)
            return values

        drawn = randomness.state()
        randomness.seed_all(EVALUATION_SEED, 0)
        try:
            *sums, tasks = measured(batches, measure, gather)
        finally:
            randomness.restore(drawn)
        means = [each / tasks for each in sums]
        keys = [f"{name}{self._after(k)}" for k in self._steps for name in names]
        return dict(zip(keys, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What is meta-learned beside the model."""
        return {name: value.detach() for name, value in self.learner.extra.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: it is of another inner loop.
        """
        load_extra(self.learner, state)

    def _after(self, steps: int) -> str:
        return "" if steps == self._steps[0] else f"@{steps}"

    def _check(self, trace: Trace, losses: Tensor, batch: Batch, when: str) -> None:
        """Stop where an inner loop has diverged."""
        fine = torch.isfinite(trace.losses) & torch.isfinite(trace.norms)
        if bool(fine.all()) and bool(torch.isfinite(losses).all()):
            return
        task = _first(~fine, ~torch.isfinite(losses))
        seen = trouble(Trace(*(each[task] for each in trace)))
        if seen is None:
            steps = self.learner.problem.steps
            seen = (
                f"after inner step {steps}: query loss {float(losses[task]):.4g} (gradient norm of "
                f"that step: {float(trace.norms[task, -1]):.4g})"
            )
        raise TrainingError(
            f"{when}: the inner loop of task {int(batch[POSITION][task])} diverged {seen}",
            hint="lower inner.lr or inner.steps, or clip the meta-gradient: train.clip",
        )

    def _check_held_out(self, values: Tensor, batch: Batch) -> None:
        """Stop where measures (B, n) are not finite."""
        fine = torch.isfinite(values)
        if bool(fine.all()):
            return
        task = int((~fine.all(dim=1)).int().argmax())
        steps = max(self._steps)
        trace = self.learner.traced(batch, task, steps)
        seen = trouble(trace) or (
            f"after inner step {steps} (gradient norm of that step: {float(trace.norms[-1]):.4g})"
        )
        raise TrainingError(
            f"the inner loop of held-out task {int(batch[POSITION][task])} diverged {seen}",
            hint="lower inner.lr, or evaluate.inner_steps",
        )

    def _doubt(self, found: Estimate, step: int) -> None:
        """Say once that an implicit gradient is not what it is taken for."""
        if self._doubted or not isinstance(self.learner.estimator, Implicit | Bayesian):
            return
        doubts = list[str]()
        left = float(found.solved.residual.max())
        if left > _ROUGH:
            doubts.append(f"conjugate gradients left {left:.2g} of the right side")
        bent = int(found.solved.indefinite.sum())
        if bent:
            doubts.append(
                f"they stopped at a direction of negative curvature in {bent} of "
                f"{len(found.loss)} tasks"
            )
        rest = float((found.trace.norms[:, -1] / found.trace.norms[:, 0]).max())
        if rest > _ROUGH:
            doubts.append(
                f"the inner loop has not come to rest: before its last step the gradient is still "
                f"{rest:.2g} of the first"
            )
        if not doubts:
            return
        self._doubted = True
        logger.warning(
            "step %d: the implicit meta-gradient is biased, since %s. This is said once; more "
            "estimator.solver_steps, inner.steps or inner.proximal help",
            step,
            "; ".join(doubts),
        )


def load_extra(learner: Learner, state: Mapping[str, Any]) -> None:
    """Put back what is meta-learned beside a model.

    Raises:
        CheckpointError: it is of another inner loop or model.
    """
    other = "use the configuration that the run was started with"
    if state.keys() != learner.extra.keys():
        odd = sorted(state.keys() ^ learner.extra.keys())
        raise CheckpointError(
            f"what is meta-learned beside the model is of another inner loop: {len(odd)} tensors "
            f"are in one of the two only, such as {odd[0]}",
            hint=other,
        )
    for name, value in learner.extra.items():
        # Smaller ones would be broadcast.
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{name} has the shape {tuple(state[name].shape)} there and {tuple(value.shape)} "
                "in this inner loop",
                hint=other,
            )
    with torch.no_grad():
        for name, value in learner.extra.items():
            value.copy_(state[name])


def _check_gradient(gradient: Meta, when: str) -> None:
    """Refuse a meta-gradient that is not finite, or whose norm is not, where all losses are."""
    values = [(name, value) for part in gradient for name, value in part.items()]
    if bool(torch.isfinite(nn.utils.get_total_norm([value for _, value in values]))):
        return
    for name, value in values:
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"{when}: the meta-gradient of {name} is not finite, and all losses of the inner "
                "loops are: it diverged in second derivatives, or in the forward at values without "
                "one, such as a root of zero",
                hint=_CALMER,
            )
    name, largest = max(
        ((name, float(value.abs().max())) for name, value in values), key=lambda pair: pair[1]
    )
    raise TrainingError(
        f"{when}: the meta-gradient diverged: its norm overflows, and the largest entry, of "
        f"{name}, is {largest:.4g}",
        hint=_CALMER,
    )


def _first(*broken: Tensor) -> int:
    """The task of the first trouble: of those at the smallest step the first."""
    whole = torch.cat([broken[0], broken[1].unsqueeze(1)], dim=1)
    steps = torch.where(whole.any(1), whole.int().argmax(1), whole.shape[1])
    return int(steps.argmin())


class _Estimated(torch.autograd.Function):
    """A loss whose gradient is given."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gradients: Sequence[Tensor] = ctx.saved_tensors
        return (None, None, *[None] * len(gradients), *(grad_outputs[0] * g for g in gradients))


def example_of(data: Data) -> Batch:
    """Two held-out tasks."""
    from surgery.train.data.base import Place

    return data.held_out.batch([Place(0, 0), Place(1, 1)])
