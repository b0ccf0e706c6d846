"""Seeded values for example inputs. The global random generator is never touched."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


class Uninferable(Exception):
    """An input that no rule covers; ``infer`` turns it into a SourceError with the signature."""


class Draw:
    """Draws tensors on the CPU from a generator of its own.

    Args:
        batch: Size of the first dimension of what is drawn.
        seed: Seed of the generator.
    """

    def __init__(self, batch: int, seed: int) -> None:
        self.batch = batch
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values of ``shape``, without the batch dimension added."""
        return torch.randn(shape, generator=self._generator, device="cpu")

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high) of ``shape``."""
        return torch.randint(low, high, shape, generator=self._generator, device="cpu")

    def ids(self, length: int, vocabulary: int, special: Collection[int] = ()) -> Tensor:
        """Token ids (batch, length), none of them special, as long as others are left."""
        ordinary = [token for token in range(min(vocabulary, 4096)) if token not in special]
        table = torch.tensor(ordinary or [0], device="cpu")
        return table[self.integers(0, len(table), self.batch, length)]

    def padding(self, length: int) -> Tensor:
        """Attention mask (batch, length) of ones; the last row is padded at its end."""
        mask = torch.ones(self.batch, length, dtype=torch.long, device="cpu")
        mask[-1, length - length // 6 :] = 0
        return mask
