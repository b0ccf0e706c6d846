"""SORSA: singular values and orthonormal regularised singular vectors (arXiv 2409.00055)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from architectures.adapters.base import Init, Matrix, Method
from architectures.adapters.decompositions import Decomposition, frobenius


class SORSA(Method):
    """Principal singular values and vectors, trained as three tensors; the rest is frozen.

    With W = U diag(S) V the singular value decomposition and s the scaling::

        W' = W - s U_r diag(S_r) V_r + s B diag(S) A

    B, S and A start as U_r, S_r and V_r. ``penalty`` keeps B and A close to orthonormal::

        gamma · mean of |A Aᵀ - I|_F and |Bᵀ B - I|_F

    The norm is not squared, as in the authors' code: its gradient does not become smaller on the
    way to orthonormal vectors, and at the start it points wherever rounding left it.
    """

    @dataclass(frozen=True)
    class Options(Decomposition):
        """The weight of the penalty, and how the singular vectors are found.

        Attributes:
            gamma: Factor of the penalty.
        """

        gamma: float = 4e-4

        def __post_init__(self) -> None:
            super().__post_init__()
            if not (math.isfinite(self.gamma) and self.gamma >= 0):
                raise ValueError(f"gamma must be a number that is not negative, got {self.gamma}")

    inits: ClassVar[tuple[Init, ...]] = ()
    changes_weight: ClassVar[bool] = True

    options: Any
    lora_S: nn.Parameter  # noqa: N815 - beside lora_A and lora_B

    @classmethod
    def tensors(cls, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        """``lora_A`` (*stack, rank, columns), ``lora_B`` (*stack, rows, rank), ``lora_S``."""
        return {
            "lora_A": (*matrix.stack, rank, matrix.columns),
            "lora_B": (*matrix.stack, matrix.rows, rank),
            "lora_S": (*matrix.stack, rank),
        }

    @torch.no_grad()
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Decompose the weight; what is left of it."""
        if weight is None or weight.is_meta:
            return None
        U, S, V = self.options.leading(weight, self.rank, generator)
        self.lora_B.copy_(U)
        self.lora_S.copy_(S)
        self.lora_A.copy_(V)
        return self.rest(weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (*stack, rank, columns) and ``B diag(S)`` (*stack, rows, rank)."""
        return self.lora_A, self.lora_B * self.lora_S.unsqueeze(-2)

    def penalty(self) -> Tensor | None:
        """``gamma · mean(|A Aᵀ - I|_F, |Bᵀ B - I|_F)`` over both factors and the stack."""
        A, B = self.lora_A, self.lora_B
        eye = torch.eye(self.rank, device=A.device, dtype=A.dtype)
        away = [frobenius(gram - eye) for gram in (A @ A.mT, B.mT @ B)]
        return self.options.gamma * torch.stack(away).mean()
