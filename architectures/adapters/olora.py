"""OLoRA: orthonormal low-rank adaptation (arXiv 2406.01775)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from architectures.adapters.base import Init
from architectures.adapters.decompositions import orthonormal, wide
from architectures.adapters.lora import LoRA


class OLoRA(LoRA):
    """The factors start from the QR decomposition of the weight, and what is left is frozen.

    With W = Q R::

        B = Q[:, :r]     A = R[:r]     W <- W - s B A

    Without pivoting these are the directions of the first r columns of W, not the largest ones.
    The factors do not depend on the scaling s.
    """

    inits: ClassVar[tuple[Init, ...]] = ()
    changes_weight: ClassVar[bool] = True

    @torch.no_grad()
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Decompose the weight; what is left of it."""
        if weight is None or weight.is_meta:
            return None
        matrix = wide(weight)
        # The first r columns of Q are those of the first r columns of W alone.
        basis = orthonormal(matrix[..., : self.rank])
        self.lora_B.copy_(basis)
        self.lora_A.copy_(basis.mT @ matrix)
        return self.rest(weight)
