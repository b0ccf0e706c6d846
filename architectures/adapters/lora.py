"""LoRA: low-rank adaptation (arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from architectures.adapters.base import Init, Matrix, Method


class LoRA(Method):
    """``W' = W + scaling · B A`` with A drawn at random and B zero, so that W' starts as W.

    ``kaiming`` draws A uniformly within ±1/√columns (the reference implementation),
    ``gaussian`` from a normal distribution with standard deviation 1/rank.
    """

    @classmethod
    def tensors(cls, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        """``lora_A`` (*stack, rank, columns) and ``lora_B`` (*stack, rows, rank)."""
        return {
            "lora_A": (*matrix.stack, rank, matrix.columns),
            "lora_B": (*matrix.stack, matrix.rows, rank),
        }

    @torch.no_grad()
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Draw A, zero B."""
        if self.lora_A.is_meta:
            return None
        self.lora_A.copy_(draw(self.lora_A.shape, init, generator))
        self.lora_B.zero_()
        return None


def draw(shape: tuple[int, ...], init: Init, generator: torch.Generator | None) -> Tensor:
    """A float32 CPU tensor ``(*stack, rank, columns)`` drawn as ``init`` says."""
    rank, columns = shape[-2:]
    if init == "gaussian":
        return torch.randn(shape, generator=generator) / rank
    bound = 1 / math.sqrt(columns)
    return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)
