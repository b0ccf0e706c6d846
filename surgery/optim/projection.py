"""Projection of a gradient onto the singular vectors that carry most of it.

Source: "GaLore: memory-efficient LLM training by gradient low-rank projection", arXiv 2403.03507.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Mode = Literal["std", "reverse_std", "left", "right", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of what is kept of an ``(m, n)`` gradient; at least one of the two.

    Attributes:
        left: ``(m, r)``, orthonormal columns; None where rows are not projected.
        right: ``(r, n)``, orthonormal rows; None where columns are not projected.
    """

    left: Tensor | None
    right: Tensor | None

    def project(self, gradient: Tensor) -> Tensor:
        """``R = leftᵀ G rightᵀ``: ``(m, n)`` to ``(r, n)``, ``(m, r)`` or ``(r, r)``."""
        if self.left is not None:
            gradient = self.left.mT @ gradient
        return gradient if self.right is None else gradient @ self.right.mT

    def add_back(self, weight: Tensor, update: Tensor, *, keep: float, by: float) -> None:
        """``W ← keep · W + by · left U right``, in place, with one rounding of the sum.

        Args:
            weight: ``(m, n)``.
            update: As ``project`` gives it.
            keep: Factor of the weight.
            by: Factor of the update.
        """
        if self.left is None:
            first, second = update, cast("Tensor", self.right)
        elif self.right is None:
            first, second = self.left, update
        else:
            first, second = self.left @ update, self.right
        weight.addmm_(first, second, beta=keep, alpha=by)


def sides(shape: torch.Size | tuple[int, int], mode: Mode) -> tuple[bool, bool]:
    """Which bases an ``(m, n)`` gradient has: (left, right).

    ``std`` takes the smaller basis, along the shorter side, ``reverse_std`` the other one, which
    gives the smaller moments.
    """
    tall = shape[0] >= shape[1]
    if mode == "std":
        return not tall, tall
    if mode == "reverse_std":
        return tall, not tall
    return mode != "right", mode != "left"


def principal_bases(
    gradient: Tensor, rank: int, mode: Mode, *, before: Bases | None = None
) -> Bases:
    """The singular vectors of the ``rank`` largest singular values of a gradient.

    They are computed in float32, or in float64 for a float64 gradient, whatever autocast says,
    and kept in the gradient's dtype.

    The sign of a singular vector is arbitrary. Moments outlive a change of bases, so a vector that
    only flipped would turn its momentum around: each vector points to the side of the one that
    was in its place before. That makes a run independent of the signs that a library gives.

    Args:
        gradient: ``(m, n)``, finite.
        rank: r; where a side is shorter, the rank is that side's.
        mode: Which bases.
        before: The bases in use until now, of the same rank and mode; None at the first time.
    """
    precise = gradient if gradient.dtype == torch.float64 else gradient.float()
    with torch.autocast(gradient.device.type, enabled=False):
        u, _, vh = cast("Any", torch.linalg).svd(precise, full_matrices=False)
    left, right = sides(gradient.shape, mode)
    old = before or Bases(None, None)
    return Bases(
        _basis(u[:, :rank], old.left, gradient, along=0) if left else None,
        _basis(vh[:rank], old.right, gradient, along=1) if right else None,
    )


def empty_bases(like: Tensor, rank: int, mode: Mode) -> Bases:
    """Room for the bases of a gradient, to receive them in."""
    left, right = sides(like.shape, mode)
    rank = min(rank, *like.shape)
    return Bases(
        like.new_empty(like.shape[0], rank) if left else None,
        like.new_empty(rank, like.shape[1]) if right else None,
    )


def state_elements(shape: torch.Size | tuple[int, int], rank: int, mode: Mode = "std") -> int:
    """Numbers that the optimizer keeps for an ``(m, n)`` weight: bases and two moments.

    For ``std`` that is ``r · min(m, n) + 2 r · max(m, n)``; Adam keeps ``2 m n``.
    """
    m, n = shape
    rank = min(rank, m, n)
    left, right = sides(shape, mode)
    moment = (rank if left else m) * (rank if right else n)
    return 2 * moment + (m * rank if left else 0) + (n * rank if right else 0)


def _basis(vectors: Tensor, old: Tensor | None, like: Tensor, *, along: int) -> Tensor:
    """Vectors as a tensor of its own: a slice would keep all singular vectors in memory."""
    if old is not None:
        flipped = (vectors * old).sum(along, keepdim=True) < 0
        vectors = torch.where(flipped, -vectors, vectors)
    return vectors.to(like.dtype).clone(memory_format=torch.contiguous_format)
