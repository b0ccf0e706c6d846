"""A class of somebody's own, in a module that is not installed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOPE = 0.1


def squeezed(x: Tensor) -> Tensor:
    """A function that the class needs."""
    return torch.nn.functional.leaky_relu(x, SLOPE)


class Step(nn.Module):
    """A residual step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., width)."""
        return x + squeezed(self.linear(x))


class Tower(nn.Module):
    """Steps one after the other, and a tied head."""

    def __init__(self, width: int, *, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.steps = nn.ModuleList(Step(width) for _ in range(depth))
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, length, 11) of ids (batch, length)."""
        x = self.embed(ids)
        for step in self.steps:
            x = step(x)
        return self.head(x)


class Fixed(Tower):
    """A tower that needs no arguments."""

    def __init__(self) -> None:
        super().__init__(8, depth=2)
