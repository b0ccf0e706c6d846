"""What an estimator of the meta-gradient is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from surgery.train.adapt.inner import Meta, Problem, Task, Tensors, Trace


class Solved(NamedTuple):
    """How well conjugate gradients did.

    Attributes:
        residual: Norm of b - A x over that of b, a scalar.
        indefinite: Whether a direction of no positive curvature ended the search, a scalar bool.
    """

    residual: Tensor
    indefinite: Tensor


class Estimate(NamedTuple):
    """The meta-gradient of one task.

    Attributes:
        gradient: Of the query loss with respect to everything that is meta-learned, in its shapes.
        loss: Query loss after the inner loop, a scalar.
        trace: What the inner loop saw, (K,) each.
        solved: How well a linear system was solved on the way; where none was, it is.
    """

    gradient: Meta
    loss: Tensor
    trace: Trace
    solved: Solved = Solved(torch.zeros(()), torch.zeros((), dtype=torch.bool))


class Estimator(ABC):
    """Estimates how the query loss after the inner loop depends on what is meta-learned.

    Pure: tensors in, tensors out, no graph left behind. It can be mapped over tasks.
    """

    @abstractmethod
    def __call__(self, problem: Problem, meta: Meta, task: Task) -> Estimate:
        """The meta-gradient of one task.

        Args:
            problem: Model, loss and step rule.
            meta: What is meta-learned, by parameter, without gradients.
            task: Support (N, ...) and query (M, ...) samples by name.
        """

    def learned(self, parameters: Mapping[str, Tensor], seed: int) -> Tensors:
        """What the estimator itself learns, as it starts; empty for nothing."""
        return {}

    def walked(
        self, problem: Problem, meta: Meta, support: Tensors, steps: int
    ) -> tuple[list[Tensors], Trace]:
        """States after 0 to ``steps`` inner steps, as ``predicted`` takes them; what was seen."""
        path = problem.path(meta, support, steps, states=True)
        return path.states, path.trace

    def adapted(self, problem: Problem, meta: Meta, support: Tensors, steps: int) -> list[Tensors]:
        """States after 0 to ``steps`` inner steps, as ``predicted`` takes them."""
        return self.walked(problem, meta, support, steps)[0]

    def predicted(
        self,
        problem: Problem,
        meta: Meta,
        state: Tensors,
        predict: Callable[[Tensors], Tensor],
        average: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """What an adapted model predicts.

        Args:
            problem: Model, loss and step rule.
            meta: What is meta-learned.
            state: One of ``adapted``.
            predict: Values of the model's parameters → predictions (M, ...).
            average: Predictions of several draws (D, M, ...) → one (M, ...), for estimators that
                draw.

        Returns:
            Predictions (M, ...).
        """
        return predict(problem.values(meta.others, state))


def differentiated(problem: Problem, meta: Meta, task: Task, last: int) -> Estimate:
    """Differentiate the last steps of the inner loop; gradients of those before are constants.

    All steps make it the exact meta-gradient, none the first-order one. What the step rule learns
    is differentiated through in every step.

    Args:
        problem: Model, loss and step rule.
        meta: What is meta-learned.
        task: The task.
        last: How many steps.
    """
    before = problem.path(meta, task.support, problem.steps - last)

    def outer(meta: Meta) -> tuple[Tensor, Trace]:
        state = meta.start
        if last < problem.steps:
            state = problem.moved(meta.extra, state, before.total)
        state, trace = problem.unrolled(meta, state, task.support, last)
        return problem.query(meta.others, state, task), trace

    gradient, (loss, trace) = cast(
        "tuple[Any, tuple[Tensor, Trace]]",
        torch.func.grad_and_value(outer, has_aux=True)(meta),
    )
    joined = Trace(
        torch.cat([before.trace.losses, trace.losses]), torch.cat([before.trace.norms, trace.norms])
    )
    return Estimate(Meta(*gradient), loss, joined)
