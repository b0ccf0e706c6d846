"""Finite differences of many coefficients at the cost of few forwards.

Coefficients whose gradients are of like size are moved together, each by a step that is inverse
to its gradient and of random sign. Each then contributes the same to the difference, so that one
wrong gradient among the sixteen shows as 6 %, far above what the difference is off by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOGETHER = 16
#: Difference to the gradient that is put down to the step, relative to the sum of contributions.
TOLERANCE = 1e-3
#: Relative to the largest gradient, what the disagreement is measured against at least: gradients
#: ``_FLOOR * TOLERANCE`` times the largest are not told from zero.
_FLOOR = 1e-3
#: Steps in units of ``scale``: the smaller the better, unless the model itself rounds to float32
#: within, or chooses experts or code book entries.
_STEPS = (1e-4, 1e-3, 1e-2, 1e-6)


@dataclass(frozen=True)
class Mismatch:
    """A group of coefficients whose difference is not what their gradients say."""

    indices: tuple[int, ...]
    expected: float
    found: float


def compare(
    loss: Callable[[], float], coefficients: Sequence[Tensor], scale: float, seed: int = 0
) -> tuple[float, list[Mismatch]]:
    """Compare ``.grad`` of float64 coefficients with central differences of ``loss``.

    Args:
        loss: Runs the model.
        coefficients: Float64 leaves with ``.grad``.
        scale: The change of a coefficient over which the loss bends.
        seed: Of the signs, and of the two coefficients that are checked alone as well.

    Returns:
        The largest disagreement, relative to the sum of the contributions, and what disagreed.
    """
    gradient = torch.cat([tensor.grad.flatten() for tensor in coefficients])
    generator = torch.Generator().manual_seed(seed)
    groups = list(gradient.abs().argsort(descending=True).split(TOGETHER))
    alone = torch.randperm(len(gradient), generator=generator)[:2]
    worst, wrong = 0.0, list[Mismatch]()
    for group in (*groups, *alone.split(1)):
        direction = torch.zeros_like(gradient)
        signs = torch.randint(0, 2, group.shape, generator=generator) * 2.0 - 1
        weights = gradient[group].abs()
        direction[group] = signs.double() / weights.clamp(min=max(1e-2 * weights.max(), 1e-300))
        direction /= direction.abs().max()
        off, mismatch = _along(loss, coefficients, gradient, direction * scale)
        worst = max(worst, off)
        if off > TOLERANCE:
            wrong.append(Mismatch(tuple(group.tolist()), *mismatch))
    return worst, wrong


def _along(
    loss: Callable[[], float],
    coefficients: Sequence[Tensor],
    gradient: Tensor,
    direction: Tensor,
) -> tuple[float, tuple[float, float]]:
    """How far the difference along a direction is off, and both; of the step that is off least."""
    expected = float(gradient @ direction)
    size = float(gradient.abs() @ direction.abs())
    floor = _FLOOR * float(gradient.abs().max() * direction.abs().max())
    best: tuple[float, tuple[float, float]] | None = None
    for step in _STEPS:
        found = (_moved(loss, coefficients, step * direction)) / (2 * step)
        off = abs(found - expected) / (size + floor) if size + floor else abs(found)
        if best is None or off < best[0]:
            best = off, (expected, found)
        if off <= 0.1 * TOLERANCE:
            break
    assert best is not None
    return best


def _moved(loss: Callable[[], float], coefficients: Sequence[Tensor], change: Tensor) -> float:
    """``loss`` after a change less ``loss`` before it, each side of where the coefficients are."""
    kept = [tensor.detach().clone() for tensor in coefficients]
    parts = change.split([tensor.numel() for tensor in coefficients])
    sides: list[float] = []
    for sign in (1, -1):
        with torch.no_grad():
            for tensor, start, part in zip(coefficients, kept, parts, strict=True):
                tensor.copy_(start + sign * part.view(start.shape))
            sides.append(loss())
    with torch.no_grad():
        for tensor, start in zip(coefficients, kept, strict=True):
            tensor.copy_(start)
    return sides[0] - sides[1]
