"""Conjugate gradients on tensors by name, of a fixed number of steps for ``vmap`` to map."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from surgery.train.adapt.estimators.base import Solved
from surgery.train.adapt.inner import Tensors, dot, norm


class Solution(NamedTuple):
    """A solution.

    Attributes:
        x: By name.
        solved: How well.
    """

    x: Tensors
    solved: Solved


def conjugate_gradients(
    matrix: Callable[[Tensors], Tensors],
    b: Tensors,
    *,
    steps: int,
    diagonal: Tensors | None = None,
    tolerance: float = 1e-10,
) -> Solution:
    """Solve ``A x = b`` for a symmetric positive definite A.

    The Hessian of a network need not be definite. A direction along which ``pᵀ A p`` is not
    positive ends the search where it is, as in Steihaug's method (1983), and is reported.

    Args:
        matrix: x → A x.
        b: The right side, by name.
        steps: Products with A at most.
        diagonal: A positive diagonal close to A; it preconditions, and ``b / diagonal`` is where
            the search starts. None starts from zero.
        tolerance: Residual over that of b below which nothing changes any more.
    """
    scale = norm(b).clamp_min(torch.finfo(norm(b).dtype).tiny)
    x = {n: torch.zeros_like(t) if diagonal is None else t / diagonal[n] for n, t in b.items()}
    product = {n: torch.zeros_like(t) for n, t in b.items()} if diagonal is None else matrix(x)
    r = {n: t - product[n] for n, t in b.items()}
    z = _preconditioned(r, diagonal)
    p, rz = z, dot(r, z)
    stopped = torch.zeros_like(scale, dtype=torch.bool)
    for _ in range(steps):
        product = matrix(p)
        curvature = dot(p, product)
        going = norm(r) > tolerance * scale
        stopped = stopped | (going & (curvature <= 0))
        going = going & ~stopped
        step = torch.where(going, rz / torch.where(going, curvature, 1.0), 0.0)
        x = {n: t + step * p[n] for n, t in x.items()}
        r = {n: t - step * product[n] for n, t in r.items()}
        z = _preconditioned(r, diagonal)
        new = dot(r, z)
        turn = torch.where(going, new / torch.where(going, rz, 1.0), 0.0)
        p = {n: t + turn * p[n] for n, t in z.items()}
        rz = new
    return Solution(x, Solved(norm(r) / scale, stopped))


def _preconditioned(r: Tensors, diagonal: Tensors | None) -> Tensors:
    return r if diagonal is None else {n: t / diagonal[n] for n, t in r.items()}
