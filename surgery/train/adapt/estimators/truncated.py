"""The truncated meta-gradient: through the last inner steps only (arXiv 1810.10667)."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.train.adapt.estimators.base import Estimate, Estimator, differentiated
from surgery.train.adapt.inner import Meta, Problem, Task


@dataclass(frozen=True)
class Truncated(Estimator):
    """Differentiates the last ``terms`` steps.

    Attributes:
        terms: How many; no more than there are inner steps.
    """

    terms: int

    def __call__(self, problem: Problem, meta: Meta, task: Task) -> Estimate:
        """``∏_{k ≥ K - terms} (I - S H_k) ∇L_query``."""
        return differentiated(problem, meta, task, min(self.terms, problem.steps))
