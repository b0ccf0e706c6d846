"""The first-order meta-gradient (FOMAML, arXiv 1703.03400, section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.train.adapt.estimators.base import Estimate, Estimator, differentiated
from surgery.train.adapt.inner import Meta, Problem, Task


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """Takes the gradients of the inner loop as constants: no second derivatives, no graph."""

    def __call__(self, problem: Problem, meta: Meta, task: Task) -> Estimate:
        """``∇L_query`` at the adapted parameters."""
        return differentiated(problem, meta, task, 0)
