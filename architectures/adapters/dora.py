"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from architectures.adapters.base import Init, Matrix
from architectures.adapters.decompositions import row_norms
from architectures.adapters.lora import LoRA


class DoRA(LoRA):
    """Magnitude and direction of every row of the weight, trained apart.

    With m one magnitude per row and n the norms of the rows of ``W + s B A``::

        W' = m / n ⊙ (W + s B A)

    m starts as the norms of the rows of W and B as zero, so that W' starts as W. No gradient
    flows through n, as the paper proposes to save memory. A row whose norm is zero is left
    undivided: an all-zero row of W starts as plain LoRA does.

    The norms come from Gram products, ``n² = |W|² + 2 s ⟨B, W Aᵀ⟩ + s² ⟨B, B (A Aᵀ)⟩`` per row, so
    that no second matrix of the size of W is formed, unless W is in half precision, of which
    there is a copy in float32 for a moment.
    """

    scales_rows = True
    reads_weight: ClassVar[bool] = True

    lora_magnitude_vector: nn.Parameter

    @classmethod
    def tensors(cls, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        """LoRA's, and ``lora_magnitude_vector`` (*stack, rows)."""
        magnitude = (*matrix.stack, matrix.rows)
        return {**super().tensors(matrix, rank), "lora_magnitude_vector": magnitude}

    @torch.no_grad()
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Draw A, zero B, measure the rows."""
        super().start(init, generator, weight)
        if weight is not None and not weight.is_meta:
            self.lora_magnitude_vector.copy_(self._norms(weight))
        return None

    def gain(self, weight: Tensor) -> Tensor:
        """``m / n``, one where n is zero; ``(*stack, rows)``.

        Args:
            weight: The base weight as ``(*stack, rows, columns)``.
        """
        magnitude = self.lora_magnitude_vector
        # Rounded as the magnitude is, so that they are equal at the start.
        norms = self._norms(weight).to(magnitude.dtype)
        empty = norms == 0
        return torch.where(empty, 1.0, magnitude / norms.masked_fill(empty, 1.0))

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> Tensor:
        """Norms of the rows of ``W + s B A``, ``(*stack, rows)``, in float32 at least."""
        with torch.autocast(weight.device.type, enabled=False):
            dtype = torch.promote_types(weight.dtype, self.lora_A.dtype)
            dtype = torch.promote_types(dtype, torch.float32)
            W, A, B = (each.to(dtype) for each in (weight, *self.factors()))
            crossed = (B * (W @ A.mT)).sum(-1) * (2 * self.scaling)
            changed = (B * (B @ (A @ A.mT))).sum(-1) * self.scaling**2
            return (row_norms(W).square() + crossed + changed).clamp_min(0).sqrt()
