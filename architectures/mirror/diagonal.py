"""Diagonal: an elementwise monotone map, piecewise linear.

The learned proximal operators of MetaProxNet (ICLR 2024, repository zhangyilang/MetaProxNet) are
the special case whose control points increase; see ``Diagonal.set_control_points``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from architectures.mirror.base import MirrorMap


class Diagonal(MirrorMap):
    """``phi = f(z)`` for every number of a tensor, f piecewise linear and increasing.

    The pieces are equally long and cover [-radius, radius]; the outer two go on beyond it. The
    slopes are ``exp(log_slopes)``, so that f increases whatever the parameters are. f is computed
    as z plus what it differs by, which is exactly zero at the start::

        f(z) = z + shift + Σ_k (exp(w_k) - 1) · (the length of piece k between 0 and z)

    The Jacobian is diagonal and positive, so f is the gradient of a strictly convex potential.

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
        return (_bent(z, self.grid[1:-1], self.log_slopes) + self.shift,)

    def dual(self, *primal: Tensor) -> tuple[Tensor, ...]:
        """The inverse, piecewise linear as well: the slopes and the lengths are the inverse ones.

        Args:
            primal: One tensor in the shape it has.
        """
        (phi,) = primal
        bends = [
            _bent(torch.full_like(self.shift, point), self.grid[1:-1], self.log_slopes)
            for point in self.grid[1:-1]
        ]
        return (_bent(phi - self.shift, bends, -self.log_slopes),)

    def control_points(self) -> Tensor:
        """F at the points of ``grid``: ``(pieces + 1,)`` or ``(pieces + 1, *shape)``."""
        values = [
            _bent(torch.full_like(self.shift, point), self.grid[1:-1], self.log_slopes)
            for point in self.grid
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
        rises = values.diff(dim=0)
        if not bool((rises > 0).all()):
            raise ValueError("the control points do not increase, so the map has no inverse")
        step = 2 * self.options.radius / self.options.pieces
        self.log_slopes.copy_((rises / step).log())
        self.shift.zero_()
        # With the slopes in place the curve is right but for its height.
        self.shift.copy_(values[0] - self.control_points()[0])


def _bent(z: Tensor, bends: Any, log_slopes: Tensor) -> Tensor:
    """A piecewise linear curve through 0 at z.

    Args:
        z: Any shape.
        bends: Where one piece ends and the next begins, increasing; numbers or tensors.
        log_slopes: Logarithm of the slope of each piece, one more than there are bends.
    """
    zero = torch.zeros_like(z)
    bent = z
    for k, slope in enumerate(torch.expm1(log_slopes).unbind(0)):
        low = bends[k - 1] if k else None
        high = bends[k] if k < len(bends) else None
        bent = bent + slope * (_within(z, low, high) - _within(zero, low, high))
    return bent


def _within(z: Tensor, low: Any, high: Any) -> Tensor:
    if low is None and high is None:
        return z
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        z = z if low is None else torch.maximum(z, low)
        return z if high is None else torch.minimum(z, high)
    return z.clamp(low, high)
