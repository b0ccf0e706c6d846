"""PiSSA: principal singular values and vectors adaptation (arXiv 2404.02948)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from architectures.adapters.base import Init
from architectures.adapters.decompositions import Decomposition
from architectures.adapters.lora import LoRA


class PiSSA(LoRA):
    """The factors start as the principal part of the weight, and what is left of it is frozen.

    With W = U S V the singular value decomposition and s the scaling::

        B = U_r (S_r / s)^½     A = (S_r / s)^½ V_r     W <- W - s B A

    The model computes at the start what it did before, up to the rounding of what is left.
    """

    Options: ClassVar[type] = Decomposition
    inits: ClassVar[tuple[Init, ...]] = ()
    changes_weight: ClassVar[bool] = True

    options: Any

    @torch.no_grad()
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Decompose the weight; what is left of it."""
        if weight is None or weight.is_meta:
            return None
        U, S, V = self.options.leading(weight, self.rank, generator)
        root = (S / self.scaling).sqrt()
        self.lora_B.copy_(U * root.unsqueeze(-2))
        self.lora_A.copy_(root.unsqueeze(-1) * V)
        return self.rest(weight)
