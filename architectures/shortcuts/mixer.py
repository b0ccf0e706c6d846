"""The matrix one stack mixes its states with: a topology and the constant diagonal beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.shortcuts.base import Support, Topology


class Mixer(nn.Module):
    """Coefficients of one stack. Calling it gives ``W``, one plain tensor per forward pass.

    Args:
        topology: Makes the learned part.
        diagonal: Added to every ``W_kk``: 1 where the mixture takes the shortcut's place and
            starts as it, -1 where the block adds the state itself and the mixture replaces it.
        shown: Added to every ``W_kk`` of the matrix that is shown, 1 where the block adds the
            state itself.

    Attributes:
        topology: Makes the learned part.
        diagonal: The constant on the diagonal.
        shown: The constant on the diagonal of the matrix that is shown.
        support: Per site, the states whose coefficient may ever differ from zero.
    """

    def __init__(self, topology: Topology, *, diagonal: float = 0.0, shown: float = 0.0) -> None:
        super().__init__()
        self.topology = topology
        self.diagonal = diagonal
        self.shown = shown
        self.support: Support = topology.support
        if diagonal:
            self.support = tuple(
                tuple(sorted({*row, site})) for site, row in enumerate(topology.support)
            )

    def forward(self) -> Tensor:
        """``W``: ``(K, K)``, or ``(K, K + 1)`` with the weights of ``y_k`` in the last column."""
        return _plus_diagonal(self.topology(), self.diagonal)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The coefficients as users read them, ``(K, K)``, detached."""
        # Through `self()`, not `forward`: FSDP gathers the shards in a hook of the call.
        weights: Tensor = self()
        sites = self.topology.sites
        return _plus_diagonal(weights[:, :sites].detach(), self.shown).clone()

    def extra_repr(self) -> str:
        """The two constants, for ``print(model)``."""
        return f"diagonal={self.diagonal:g}, shown={self.shown:g}"


def _plus_diagonal(weights: Tensor, value: float) -> Tensor:
    if not value:
        return weights
    eye = torch.eye(*weights.shape, dtype=weights.dtype, device=weights.device)
    return weights + value * eye
