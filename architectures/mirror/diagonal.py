"""Diagonal: an elementwise monotone map, piecewise linear.

The learned proximal operators of MetaProxNet (ICLR 2024, repository zhangyilang/MetaProxNet) are
the special case whose control points increase; see ``Diagonal.set_control_points``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from architectures.mirror.base import MirrorMap


class Diagonal(MirrorMap):
    """``phi = f(z)`` for every number of a tensor, f piecewise linear and increasing.

    The pieces are equally long and cover [-radius, radius]; the outer two go on beyond it. The
    slopes are ``exp(log_slopes)``, so that f increases whatever the parameters are, as long as the
    dtype holds the slopes::

        f(z) = shift + ∫_0^z exp(w_k(t)) dt,  k(t) the piece that t is in

    The Jacobian is diagonal and positive, so f is the gradient of a strictly convex potential.
    Where two pieces meet, the derivative is that of the upper one, of f and of its inverse.

    Attributes:
        log_slopes: ``(pieces,)``, or ``(pieces, *shape)`` where numbers do not share them.
        shift: f(0); a scalar, or one for each number.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the map.

        Attributes:
            pieces: How many pieces f has.
            radius: Where the pieces end, in the size of the numbers that are mapped.
            share: Whether all numbers of a ``tensor`` share one f, or every ``element`` has its
                own, which costs pieces + 1 times the tensor.
        """

        pieces: int = 5
        radius: float = 2.0
        share: Literal["tensor", "element"] = "tensor"

    couples: ClassVar[bool] = False

    def _build(self, made_with: dict[str, Any]) -> None:
        pieces, radius = self.options.pieces, self.options.radius
        if pieces < 1:
            raise ValueError(f"f has 1 piece or more, got pieces={pieces!r}")
        if not radius > 0:
            raise ValueError(f"the pieces cover ±radius, which must be positive, got {radius!r}")
        holds = torch.finfo(made_with["dtype"] or torch.get_default_dtype())
        if not holds.tiny * pieces <= radius <= holds.max:
            raise ValueError(f"{holds.dtype} does not hold pieces that cover ±{radius!r}")
        own = self.shapes[0] if self.options.share == "element" else ()
        self.log_slopes = nn.Parameter(torch.empty((pieces, *own), **made_with))
        self.shift = nn.Parameter(torch.empty(own, **made_with))

    @property
    def grid(self) -> tuple[float, ...]:
        """Where the pieces begin and end: pieces + 1 points from -radius to radius."""
        pieces, radius = self.options.pieces, self.options.radius
        return tuple(radius * (2 * k / pieces - 1) for k in range(pieces + 1))

    @torch.no_grad()
    def start(self, generator: torch.Generator | None) -> None:
        """Slopes of 1 and no shift. Nothing is drawn."""
        self.log_slopes.zero_()
        self.shift.zero_()

    def forward(self, *dual: Tensor) -> tuple[Tensor, ...]:
        """``f(z)``, one tensor in the shape it has."""
        (z,) = dual
        values = [slope * z + offset for slope, offset in self._lines()]
        return (_picked(z, self.grid[1:-1], values) + self.shift,)

    def dual(self, *primal: Tensor) -> tuple[Tensor, ...]:
        """The inverse: that of each piece's line, between the values of f at the bends.

        Args:
            primal: One tensor in the shape it has.
        """
        (phi,) = primal
        height = phi - self.shift
        lines = self._lines()
        bends = [
            slope * bend + offset
            for bend, (slope, offset) in zip(self.grid[1:-1], lines[:-1], strict=True)
        ]
        return (_picked(height, bends, [(height - offset) / slope for slope, offset in lines]),)

    def control_points(self) -> Tensor:
        """F at the points of ``grid``: ``(pieces + 1,)`` or ``(pieces + 1, *shape)``."""
        lines = self._lines()
        values = [
            slope * point + offset
            for point, (slope, offset) in zip(self.grid, [lines[0], *lines], strict=True)
        ]
        return torch.stack(values) + self.shift

    @torch.no_grad()
    def set_control_points(self, values: Tensor) -> None:
        """Make f the learned prox of MetaProxNet with these control points.

        Args:
            values: f at the points of ``grid``, in the shape of ``control_points()``.

        Raises:
            ValueError: they do not increase, so that no increasing f goes through them.
        """
        expected = (self.options.pieces + 1, *self.shift.shape)
        if tuple(values.shape) != expected:
            raise ValueError(f"expected control points {expected}, got {tuple(values.shape)}")
        slopes = values.diff(dim=0) * (self.options.pieces / (2 * self.options.radius))
        if not bool((slopes > 0).all()):
            raise ValueError("the control points do not increase, so the map has no inverse")
        self.log_slopes.copy_(slopes.log())
        middle = self._middle
        self.shift.copy_(values[middle] - slopes[middle] * self.grid[middle])

    @property
    def _middle(self) -> int:
        """The piece that 0 is in; a point where two meet belongs to the upper one."""
        return self.options.pieces // 2

    def _lines(self) -> list[tuple[Tensor, Tensor]]:
        """Slope and offset of the line that each piece of ``f - shift`` is a part of.

        Not as a sum over the pieces below z: where a slope is small against others, the rounding
        of such a sum hides it, and f no longer increases.
        """
        slopes = self.log_slopes.exp().unbind(0)
        middle, bends = self._middle, self.grid[1:-1]
        offsets = [torch.zeros_like(self.shift)]
        for k in range(middle, len(bends)):
            offsets.append(offsets[-1] + (slopes[k] - slopes[k + 1]) * bends[k])
        for k in reversed(range(middle)):
            offsets.insert(0, offsets[0] + (slopes[k + 1] - slopes[k]) * bends[k])
        return list(zip(slopes, offsets, strict=True))


def _picked(at: Tensor, bends: Sequence[float | Tensor], values: Sequence[Tensor]) -> Tensor:
    """For every number the value of the piece that it is in.

    One piece alone, also where two meet: clamped to the extent of each, a number there would have
    a part in none or in both, and the derivative would be no slope of the curve.

    Args:
        at: Any shape.
        bends: Where one piece ends and the next begins, increasing.
        values: What each piece makes of ``at``, one more than there are bends.
    """
    picked = values[0]
    for bend, value in zip(bends, values[1:], strict=True):
        picked = torch.where(at >= bend, value, picked)
    return picked
