"""AltLoRA: one factor at a time, along the best step that it alone can make.

Source: "AltLoRA: towards better gradient approximation in low-rank adaptation with alternating
projections", arXiv 2505.12455, as implemented by third parties; the authors' defaults are not
known, and those here are this project's.

With B at rest, of all steps on A the one that moves ``W' = W + s B A`` nearest to its gradient is
``d_A``, and the other way round::

    d_A = (Bᵀ B + ε I)⁻¹ grad_A / s²        d_B = grad_B (A Aᵀ + ε I)⁻¹ / s²

Momentum is an average of such steps, each made with the other factor as it then was. Before a new
one is added it is expressed with the factor that is there now::

    M_A ← β (Bᵀ B + ε I)⁻¹ Bᵀ B_then M_A + (1 - β) d_A
    M_B ← β M_B A_then Aᵀ (A Aᵀ + ε I)⁻¹ + (1 - β) d_B
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from surgery.optim.linalg import inverse_plus, joined, put, rounded, wide
from surgery.optim.preconditioner import by_shape, gathered_gradient, scalings
from surgery.optim.rule import Factors, StepRule, whole, write


class AltLoRA(StepRule):
    """Lets the optimizer change one factor per step, along ``M_A`` or ``M_B``.

    B comes first, since A could not move while B is zero. The factor at rest has no gradient while
    the optimizer steps, so that neither it nor its moments nor its weight decay move. The rule has
    momentum of its own: with SGD without momentum the step is the method's, any other optimizer
    works on ``M`` as on a gradient.

    Args:
        factors: The adapters.
        eps: ε.
        beta: β, how much of the momentum stays; 0 for none.
        period: Steps with one factor before it is the other one's turn.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        factors: Sequence[Factors],
        *,
        eps: float = 1e-6,
        beta: float = 0.9,
        period: int = 1,
    ) -> None:
        super().__init__(factors)
        if not (eps > 0 and 0 <= beta < 1 and period >= 1):
            raise ValueError(
                "eps must be positive, beta from 0 to below 1 and period 1 or more, got "
                f"{eps}, {beta} and {period}"
            )
        self.eps = eps
        self.beta = beta
        self.period = period
        self._resting: list[tuple[Tensor, Tensor]] = []
        if beta:
            self.kept = {each.name: _nothing_yet(each) for each in factors}

    @property
    def moving(self) -> Literal["A", "B"]:
        """The factor whose turn it is in the next step."""
        return "A" if self.steps // self.period % 2 else "B"

    def before(self, optimizer: Optimizer) -> None:
        """Give the moving factor its direction, and hide the gradient of the other one."""
        moving = self.moving
        acting = self.with_gradients()
        for alike in by_shape(acting):
            directions = self._directions(alike, moving)
            count = alike[0].A.shape[:-2].numel()
            for index, each in enumerate(alike):
                target = cast("Tensor", (each.A if moving == "A" else each.B).grad)
                own = directions[index * count : (index + 1) * count].reshape(target.shape)
                write(target, rounded(own, target.dtype))
        resting = [each.B if moving == "A" else each.A for each in acting]
        self._resting = [(factor, cast("Tensor", factor.grad)) for factor in resting]
        for factor in resting:
            factor.grad = None

    def after(self, optimizer: Optimizer) -> None:
        """Put the gradients that were hidden back."""
        for parameter, gradient in self._resting:
            parameter.grad = gradient
        self._resting = []

    def _directions(self, alike: Sequence[Factors], moving: Literal["A", "B"]) -> Tensor:
        """``M`` of adapters of one shape, ``(K, m, n)``; ``M_A`` and ``A`` are read transposed.

        In what follows F is the factor at rest, with r columns, and M has r columns too.
        """
        on_A = moving == "A"
        F = _columns([whole(each.B if on_A else each.A) for each in alike], rows=not on_A)
        gradient = _columns(
            [gathered_gradient(each.A if on_A else each.B) for each in alike], rows=on_A
        )
        inverse = inverse_plus(F.mT @ F, self.eps)
        moment = gradient @ inverse / scalings(alike) ** 2
        if self.beta:
            moment = self._averaged(alike, moving, moment, F, inverse)
        return moment.mT if on_A else moment

    def _averaged(
        self,
        alike: Sequence[Factors],
        moving: Literal["A", "B"],
        direction: Tensor,
        F: Tensor,
        inverse: Tensor,
    ) -> Tensor:
        kept = [self.kept[each.name] for each in alike]
        moments = [own[f"moment_{moving}"] for own in kept]
        factors = [own[f"beside_{moving}"] for own in kept]
        then = joined(factors).to(F.dtype)
        carried = joined(moments).to(F.dtype) @ (then.mT @ F) @ inverse
        moment = self.beta * carried + (1 - self.beta) * direction
        put(moments, moment)
        put(factors, F)
        return moment


def _columns(factors: Sequence[Tensor], *, rows: bool) -> Tensor:
    """Factors of one shape as ``(K, n, r)``, in float64; those with r rows transposed."""
    both = joined(factors).to(wide(factors[0].device))
    return both.mT if rows else both


def _nothing_yet(each: Factors) -> dict[str, Tensor]:
    """Momentum of both factors, and the other factor at the time, all with r columns."""
    dtype = torch.promote_types(each.A.dtype, torch.float32)

    def zeros(rows: int) -> Tensor:
        shape = (*each.A.shape[:-2], rows, each.rank)
        return torch.zeros(shape, dtype=dtype, device=each.A.device)

    columns, rows = each.A.shape[-1], each.B.shape[-2]
    return {
        "moment_A": zeros(columns),
        "beside_A": zeros(rows),
        "moment_B": zeros(rows),
        "beside_B": zeros(columns),
    }
