# pyright: basic, reportIndexIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# ruff: noqa: PLR0917
# The kernels are in Triton's language: to a type checker its loops and constants are none, and a
# kernel takes its arguments by position.
"""The sums on CUDA devices: one Triton kernel each, coefficients read on the device.

Tensors come as a tuple of pointers, padded to a power of two with the first of them, so that a
stack compiles a handful of kernels and not one per site.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from architectures.shortcuts.kernels.layout import flat, result_dtype, wide_dtype

#: Elements of one program.
BLOCK = 2048
#: States that one launch reads; further ones are added by further launches.
MOST = 64

_WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit(do_not_specialize=["count", "programs"])
def _combine(
    out,
    base,
    scale,
    coefficients,
    states,
    count,
    numel,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of ``out = scale · base + Σ_i coefficients_i · states_i``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    total = tl.load(base + at, mask=inside, other=0.0).to(WIDE)
    if SCALED:
        total *= tl.load(scale).to(WIDE)
    for i in tl.static_range(len(states)):
        factor = tl.load(coefficients + tl.where(i < count, i, 0)).to(WIDE)
        here = at < tl.where(i < count, numel, 0)
        total += factor * tl.load(states[i] + at, mask=here, other=0.0).to(WIDE)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "programs"])
def _pull(
    out,
    state,
    start,
    coefficients,
    gradients,
    partial,
    count,
    numel,
    programs,
    STARTED: tl.constexpr,
    NEED_STATE: tl.constexpr,
    NEED_PRODUCTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of ``out = start + Σ_i coefficients_i · gradients_i``, and its products."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(state + at, mask=inside, other=0.0).to(WIDE)
    total = tl.zeros([BLOCK], dtype=WIDE)
    if STARTED:
        total = tl.load(start + at, mask=inside, other=0.0).to(WIDE)
    for i in tl.static_range(len(gradients)):
        here = at < tl.where(i < count, numel, 0)
        gradient = tl.load(gradients[i] + at, mask=here, other=0.0).to(WIDE)
        if NEED_STATE:
            total += tl.load(coefficients + tl.where(i < count, i, 0)).to(WIDE) * gradient
        if NEED_PRODUCTS:
            place = partial + i * programs.to(tl.int64) + program
            tl.store(place, tl.sum(gradient * value, axis=0))
    if NEED_STATE:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def combine(
    base: Tensor, scale: Tensor | None, coefficients: Tensor, states: Sequence[Tensor]
) -> Tensor:
    """See the package."""
    dtype = result_dtype((base, *states))
    total = base
    for first in range(0, max(len(states), 1), MOST):
        last = first + MOST >= len(states)
        out = torch.empty_like(base, dtype=dtype if last else wide_dtype(dtype))
        part = slice(first, first + MOST)
        _launch_combine(out, total, None if first else scale, coefficients[part], states[part])
        total = out
    return total


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
    total, products = gradient, list[Tensor]()
    for first in range(0, len(gradients), MOST):
        last = first + MOST >= len(gradients)
        out = torch.empty_like(state, dtype=state.dtype if last else dtype)
        part = slice(first, first + MOST)
        partial = _launch_pull(
            out,
            state,
            total,
            coefficients[part],
            gradients[part],
            need_state=need_state,
            need_products=need_products,
        )
        total = out
        products.append(partial.sum(1).to(coefficients.dtype))
    return total if need_state else None, torch.cat(products) if need_products else None


def _launch_combine(
    total: Tensor,
    base: Tensor,
    scale: Tensor | None,
    coefficients: Tensor,
    states: Sequence[Tensor],
) -> None:
    out, base, *states = flat(total, [total, base, *states])
    with torch.cuda.device_of(out):
        _combine[(triton.cdiv(out.numel(), BLOCK),)](
            out,
            base,
            base if scale is None else scale,
            coefficients.contiguous() if states else base,
            _padded(states or [base]),
            len(states),
            out.numel(),
            SCALED=scale is not None,
            WIDE=_WIDE[wide_dtype(result_dtype((base, *states)))],
            BLOCK=BLOCK,
        )


def _launch_pull(
    total: Tensor,
    state: Tensor,
    start: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    *,
    need_state: bool,
    need_products: bool,
) -> Tensor:
    """Fills ``total``; gives the products of each gradient, ``(n, programs)``."""
    out, state, begin, *gradients = flat(
        total, [total, state, state if start is None else start, *gradients]
    )
    dtype = wide_dtype(result_dtype((state, *gradients)))
    programs = triton.cdiv(out.numel(), BLOCK)
    padded = _padded(gradients)
    partial = torch.empty(len(padded), programs, dtype=dtype, device=out.device)
    with torch.cuda.device_of(out):
        _pull[(programs,)](
            out,
            state,
            begin,
            coefficients.contiguous(),
            padded,
            partial,
            len(gradients),
            out.numel(),
            programs,
            STARTED=start is not None,
            NEED_STATE=need_state,
            NEED_PRODUCTS=need_products,
            WIDE=_WIDE[dtype],
            BLOCK=BLOCK,
        )
    return partial[: len(gradients)]


def _padded(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, then the first again up to a power of two; padding is never read."""
    size = triton.next_power_of_2(len(tensors))
    return (*tensors, *[tensors[0]] * (size - len(tensors)))
