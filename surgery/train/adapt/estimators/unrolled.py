"""The exact meta-gradient, through every inner step (MAML, arXiv 1703.03400)."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.train.adapt.estimators.base import Estimate, Estimator, differentiated
from surgery.train.adapt.inner import Meta, Problem, Task


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Differentiates the whole inner loop. Memory grows with the number of its steps."""

    def __call__(self, problem: Problem, meta: Meta, task: Task) -> Estimate:
        """``∏_k (I - S H_k) ∇L_query``, and its like for what else is learned."""
        return differentiated(problem, meta, task, problem.steps)
