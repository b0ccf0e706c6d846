"""NoRA+: gradients preconditioned as in ScaledGD, with preconditioners of Frobenius norm 1.

Source: the authors' code, BingcongLi/NoRA at e622aa2.

    grad_A ← N(Bᵀ B) grad_A        grad_B ← grad_B N(A Aᵀ)
    N(G) = (G + ε I)⁻¹ / ‖(G + ε I)⁻¹‖

The gradient of A stays as it is while B is zero, as at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from surgery.optim.linalg import inverse_plus
from surgery.optim.preconditioner import Preconditioner
from surgery.optim.rule import Factors


class NoRAPlus(Preconditioner):
    """Multiplies the gradients of the factors by normalised inverse Gram matrices before a step.

    Args:
        factors: The adapters.
        eps: ε, added to the Gram matrices.

    Raises:
        ValueError: ε is not positive.
    """

    uphill = True

    def __init__(self, factors: Sequence[Factors], *, eps: float = 1e-6) -> None:
        super().__init__(factors)
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.eps = eps

    def matrices(self, gram_A: Tensor, gram_B: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
        """``N(Bᵀ B)`` and ``N(A Aᵀ)``."""
        identity = torch.eye(gram_B.shape[-1], dtype=gram_B.dtype, device=gram_B.device)
        zero = (gram_B == 0).flatten(1).all(-1)[:, None, None]
        left = torch.where(zero, identity, self._normalised(gram_B))
        return left, self._normalised(gram_A)

    def _normalised(self, gram: Tensor) -> Tensor:
        inverse = inverse_plus(gram, self.eps)
        return inverse / cast("Any", torch.linalg).matrix_norm(inverse, keepdim=True)
