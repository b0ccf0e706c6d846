"""A class whose modules bear names that are given, and an argument of free text."""

from __future__ import annotations

from torch import Tensor, nn


class Named(nn.Module):
    """Linear steps one after the other.

    Args:
        names: Of the steps.
        label: Any text.
    """

    def __init__(self, names: list[str], label: str = "") -> None:
        super().__init__()
        self.label = label
        self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., 4)."""
        for part in self.parts.values():
            x = x + part(x)
        return x
