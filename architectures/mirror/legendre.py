"""Legendre: the gradient of a strictly convex potential, a mirror map by construction.

This one is this project's own. The published construction of the journal version (arXiv
2509.02418) was not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from architectures.mirror.base import MirrorMap, draw_uniform, modes_of, outer_sum

#: The inverse stops where the residual is this share of the size of what is summed up in it.
TOLERANCE = 1e-12
#: How far from the given values, in shares of the sums, what it finds may be mapped.
MISSED = 1e-6
_STEPS = 200
_HALVINGS = 100

_linalg = cast("Any", torch.linalg)  # it has no types


class Legendre(MirrorMap):
    """``phi = ∇ψ(z)`` with an input-convex potential of one hidden layer.

    ::

        ψ(z) = ½ Σ_i exp(d_i) z_i² + Σ_k log cosh(<a_k, z> + b_k)
        ∇ψ(z) = exp(d) ⊙ z + Σ_k a_k tanh(<a_k, z> + b_k)

    ψ is strongly convex and smooth on the whole space, so ∇ψ is one to one and onto, and its
    Jacobian, ``diag(exp(d)) + Σ_k a_k a_kᵀ (1 - tanh²)``, is symmetric positive definite, whatever
    the parameters are, as long as the dtype holds ``exp(d)``. To cost little, ``d`` is a sum of one
    vector for each dimension of the tensor, and each ``a_k`` a product of such; the positions of a
    convolution's kernel count as one dimension.

    Attributes:
        log_scales: For each dimension, of size n, its part of ``d``: ``(n,)``.
        factors: For each dimension its part of every ``a_k``: ``(rank, n)``.
        offsets: ``b``: ``(rank,)``.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the map.

        Attributes:
            rank: How many directions ``a_k`` there are.
        """

        rank: int = 4

    couples: ClassVar[bool] = False

    def _build(self, made_with: dict[str, Any]) -> None:
        rank = self.options.rank
        if rank < 1:
            raise ValueError(f"the potential has 1 direction or more, got rank={rank!r}")
        self.modes = modes_of(self.shapes[0])
        self.log_scales = nn.ParameterList(
            nn.Parameter(torch.empty(size, **made_with)) for size in self.modes
        )
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty((rank, size), **made_with)) for size in self.modes
        )
        self.offsets = nn.Parameter(torch.empty(rank, **made_with))

    @torch.no_grad()
    def start(self, generator: torch.Generator | None) -> None:
        """Directions of length zero, by their first factor alone, so that gradients reach it."""
        for each in _list(self.log_scales):
            each.zero_()
        first, *others = _list(self.factors)
        first.zero_()
        for factor in others:
            draw_uniform(factor, math.sqrt(3 / factor.shape[1]), generator)
        draw_uniform(self.offsets, 1.0, generator)

    def forward(self, *dual: Tensor) -> tuple[Tensor, ...]:
        """``∇ψ(z)``, one tensor in the shape it has."""
        (z,) = dual
        folded = z.reshape(self.modes)
        first, rest = self._directions()
        bends = torch.tanh(_inner(folded, first, rest) + self.offsets)
        added = self._combined(bends, first, rest)
        scale = outer_sum(_list(self.log_scales)).exp()
        return ((folded * scale + added).reshape(z.shape),)

    def potential(self, z: Tensor) -> Tensor:
        """``ψ(z)``, a scalar."""
        folded = z.reshape(self.modes)
        first, rest = self._directions()
        whole = first if rest is None else first.unsqueeze(-1) * rest.unsqueeze(1)
        codes = torch.mv(whole.flatten(1), folded.flatten()) + self.offsets
        # log cosh x, which does not overflow in this form.
        ridges = codes.abs() + torch.log1p(torch.exp(-2 * codes.abs())) - math.log(2)
        scale = outer_sum(_list(self.log_scales)).exp()
        return 0.5 * (scale * folded.square()).sum() + ridges.sum()

    @torch.no_grad()
    def dual(self, *primal: Tensor) -> tuple[Tensor, ...]:
        """The inverse, by Newton's method in as many unknowns as there are directions.

        ``u_k = <a_k, z> + b_k`` solves ``u + M tanh(u) = v`` with ``M_kl = <a_k, a_l / exp(d)>``,
        ``v_k = <a_k, phi / exp(d)> + b_k``; everything is computed in float64, until the residual
        is below ``TOLERANCE`` times the size of v and M. What is found is mapped again: where
        M is so large that it comes out further away than ``MISSED`` of the sums in ∇ψ, that
        raises too. It has no gradient and is not for ``vmap``, as it looks at numbers.

        Args:
            primal: One tensor in the shape it has.

        Raises:
            ArithmeticError: a number is not finite, or a tolerance was not reached.
        """
        (phi,) = primal
        factors = [factor.double() for factor in _list(self.factors)]
        scale = outer_sum([each.double() for each in _list(self.log_scales)]).exp()
        scaled = phi.double().reshape(self.modes) / scale
        gram = phi.new_ones((), dtype=torch.float64)
        for factor, log_scale in zip(factors, _list(self.log_scales), strict=True):
            gram = gram * ((factor / log_scale.double().exp()) @ factor.T)
        first, rest = factors[0], _product(factors[1:])
        inner = _inner(scaled, first, rest)
        offsets = self.offsets.double()
        added = self._combined(torch.tanh(_solved(gram, inner + offsets)), first, rest)
        z = scaled - added / scale
        again = self._combined(torch.tanh(_inner(z, first, rest) + offsets), first, rest)
        size = float(phi.abs().max()) + float(self._combined(*_sizes(first, rest)).max())
        _check_missed(float((again - added).abs().max()), size)
        return (z.reshape(phi.shape).to(phi.dtype),)

    def _directions(self) -> tuple[Tensor, Tensor | None]:
        """The first factor ``(rank, n)``, and the product of the others ``(rank, rest)`` if any."""
        first, *others = _list(self.factors)
        return first, _product(others)

    def _combined(self, bends: Tensor, first: Tensor, rest: Tensor | None) -> Tensor:
        """``Σ_k a_k · bends_k`` in the shape of the modes."""
        if rest is None:
            return torch.matmul(bends, first)
        return torch.matmul(first.T * bends, rest).reshape(self.modes)


def _inner(folded: Tensor, first: Tensor, rest: Tensor | None) -> Tensor:
    """``<a_k, z>`` for every direction: ``(rank,)``."""
    if rest is None:
        return torch.matmul(first, folded)
    return (torch.matmul(first, folded.flatten(1)) * rest).sum(-1)


def _sizes(first: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``_combined`` takes for the largest that it can give."""
    return first.new_ones(len(first)), first.abs(), None if rest is None else rest.abs()


def _check_missed(missed: float, size: float) -> None:
    if not missed <= MISSED * size:
        raise ArithmeticError(
            f"float64 does not hold the inverse of the map: what it gives is mapped {missed:g} "
            f"away, of sums of {size:g}; its scales and directions are too far apart in size"
        )


def _list(parameters: nn.ParameterList) -> Sequence[Tensor]:
    """Parameters read one by one by name, as ``functional_call`` swaps them."""
    return list(cast("Sequence[Tensor]", parameters))


def _product(factors: Sequence[Tensor]) -> Tensor | None:
    """Row by row the outer product of ``(rank, a)``, ``(rank, b)``, ...: ``(rank, a · b ···)``."""
    if not factors:
        return None
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(-1) * factor.unsqueeze(1)).flatten(1)
    return product


def _solved(gram: Tensor, wanted: Tensor) -> Tensor:
    """``u`` with ``u + gram tanh(u) = wanted``, by Newton's method with halved steps."""
    bound = TOLERANCE * _size(gram, wanted)
    u = _near(gram, wanted)
    residual = _residual(gram, u, wanted)
    for _ in range(_STEPS):
        if float(residual.abs().max()) <= bound:
            return u
        slope = torch.eye(len(u), dtype=u.dtype, device=u.device) + gram * (1 - u.tanh().square())
        step: Tensor = _linalg.solve(slope, residual)
        shorter = (u - step * 0.5**halvings for halvings in range(40))
        closer = next((v for v in shorter if _is_closer(gram, v, wanted, residual)), None)
        if closer is None:
            break
        u, residual = closer, _residual(gram, closer, wanted)
    raise ArithmeticError(
        f"the inverse of the map did not come within {TOLERANCE:g}: the residual is "
        f"{float(residual.abs().max()):g} of {float(wanted.abs().max()):g}"
    )


def _near(gram: Tensor, wanted: Tensor) -> Tensor:
    """About the solution, from wherever it starts: the residual alone can lead Newton nowhere.

    ``u = wanted - gram c`` is a solution where c minimises the convex
    ``½ <c, gram c> + Σ log cosh(wanted - gram c)``, and each step goes down on that.
    """
    enough = 1e-6 * _size(gram, wanted)
    identity = torch.eye(len(wanted), dtype=wanted.dtype, device=wanted.device)
    c, u = torch.zeros_like(wanted), wanted
    for _ in range(_STEPS):
        missing = torch.tanh(u) - c
        # Written so that a residual that is no number ends it, too.
        if not float((gram @ missing).abs().max()) > enough:
            break
        slopes = 1 - u.tanh().square()
        step: Tensor = _linalg.solve(identity + slopes.unsqueeze(1) * gram, missing)
        c = c + step * _length(gram @ step, step, u, c)
        u = wanted - gram @ c
    return u


def _size(gram: Tensor, wanted: Tensor) -> float:
    return max(float(wanted.abs().max()), float(gram.abs().sum(1).max()), 1.0)


def _residual(gram: Tensor, u: Tensor, wanted: Tensor) -> Tensor:
    return u + gram @ torch.tanh(u) - wanted


def _is_closer(gram: Tensor, u: Tensor, wanted: Tensor, residual: Tensor) -> bool:
    """Whether the residual is smaller at u: a Newton step that is short enough makes it so."""
    return float(_residual(gram, u, wanted).square().sum()) < float(residual.square().sum())


def _length(along: Tensor, step: Tensor, u: Tensor, c: Tensor) -> float:
    """How much of a Newton step to take: all of it, or as far as it surely goes down."""

    def derivative(t: float) -> float:
        return float(along @ (c + t * step - torch.tanh(u - t * along)))

    start = derivative(0.0)
    if derivative(0.5) <= 0.2 * start and derivative(1.0) <= -0.1 * start:
        return 1.0
    low, high = 0.0, 1.0
    # The derivative grows with t, from below zero: what is left of its zero lies lower than 0.
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if derivative(middle) > 0:
            high = middle
        else:
            low = middle
        if low > 0 and derivative(low) >= 0.5 * start:
            return low
    return high
