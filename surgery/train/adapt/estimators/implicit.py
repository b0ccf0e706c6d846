"""The implicit meta-gradient (iMAML, arXiv 1909.04630).

Where the inner loop has come to rest at ``F(z) = ∇L(z) + λ (z - z_0) = 0``, how z depends on z_0
follows from F alone, whatever way led there: with g the gradient of the query loss at z::

    x = (H + λ)⁻¹ g        dz_0 = λ x        d_others = ∂L_query - (∂F/∂others)ᵀ x

x is found by conjugate gradients, each step of which is one Hessian-vector product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from surgery.train.adapt.estimators.base import Estimate, Estimator
from surgery.train.adapt.estimators.conjugate import conjugate_gradients
from surgery.train.adapt.inner import Meta, Problem, Task, Tensors, added, grad_and_value, vjp


@dataclass(frozen=True)
class Implicit(Estimator):
    """Differentiates the point where the inner loop comes to rest.

    Memory does not grow with the inner steps. It is as exact as that point is reached: too few
    steps are an error that the trace shows, by norms that do not fall.

    Attributes:
        solver_steps: Steps of conjugate gradients.
    """

    solver_steps: int = 5

    def __call__(self, problem: Problem, meta: Meta, task: Task) -> Estimate:
        """The gradient by the implicit function theorem.

        Raises:
            ValueError: there is no proximal term, or the step rule is learned: where the loop
                comes to rest does not depend on how it steps.
        """
        if not problem.proximal:
            raise ValueError("implicit differentiation needs a proximal term: inner.proximal")
        if meta.extra:
            raise ValueError("what a step rule learns has no implicit gradient")
        path = problem.path(meta, task.support, problem.steps)
        state = path.states[-1]

        def query(others: Tensors, state: Tensors) -> Tensor:
            return problem.query(others, state, task)

        (others, outer), loss = cast(
            "tuple[tuple[Tensors, Tensors], Tensor]",
            grad_and_value(query, (0, 1))(meta.others, state),
        )

        def force(others: Tensors, start: Tensors, state: Tensors) -> Tensors:
            return problem.gradient(others, start, state, task.support)[0]

        _, pull = vjp(force, meta.others, meta.start, state)
        x, solved = conjugate_gradients(lambda v: pull(v)[2], outer, steps=self.solver_steps)
        on_others, on_start, _ = pull(x)
        start = {name: -value for name, value in on_start.items()}
        gradient = Meta(start, added(others, on_others, -1.0), {})
        return Estimate(gradient, loss, path.trace, solved)
