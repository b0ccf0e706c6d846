"""The sums as differentiable operations of torch: for tracing, transforms and double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from architectures.shortcuts.kernels.layout import result_dtype, wide_dtype


def combine(
    base: Tensor, scale: Tensor | None, coefficients: Tensor, states: Sequence[Tensor]
) -> Tensor:
    """See the package."""
    dtype = result_dtype((base, *states))
    total = base.to(wide_dtype(dtype))
    if scale is not None:
        total = total * scale
    # torch.export cannot read back the unbinding of an empty tensor.
    single = coefficients.unbind() if states else ()
    for coefficient, state in zip(single, states, strict=True):
        total = total + coefficient * state.to(total.dtype)
    return total.to(dtype)


def pull(
    state: Tensor,
    gradient: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    *,
    need_state: bool = True,
    need_products: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """See the package."""
    dtype = wide_dtype(result_dtype((state, *gradients)))
    total = products = None
    if need_state:
        start = torch.zeros_like(state) if gradient is None else gradient
        total = combine(start.to(dtype), None, coefficients, gradients).to(state.dtype)
    if need_products:
        sums = [(each.to(dtype) * state.to(dtype)).sum() for each in gradients]
        products = torch.stack(sums).to(coefficients.dtype)
    return total, products


def push(
    gradient: Tensor,
    coefficients: Tensor,
    states: Sequence[Tensor],
    *,
    need_states: Sequence[bool],
    need_products: bool,
) -> tuple[list[Tensor | None], Tensor | None]:
    """See the package."""
    dtype = wide_dtype(result_dtype((gradient, *states)))
    widened = gradient.to(dtype)
    totals = [
        (factor * widened).to(state.dtype) if need else None
        for factor, state, need in zip(coefficients.unbind(), states, need_states, strict=True)
    ]
    if not need_products:
        return totals, None
    sums = [(widened * state.to(dtype)).sum() for state in states]
    return totals, torch.stack(sums).to(coefficients.dtype)
