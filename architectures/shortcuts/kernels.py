"""Weighted sums of many large tensors, bound by memory traffic and nothing else.

On the CPU everything is done block by block: a block of the result stays in the cache while the
blocks of the states pass by, so that each tensor crosses the memory bus once. Sums are in float32,
or in float64 where a tensor is; the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from architectures.shortcuts import _torch

#: Elements per block and thread: with three float32 blocks at work, 384 KiB of cache.
BLOCK = 32 * 1024


def result_dtype(base: Tensor, states: Sequence[Tensor]) -> torch.dtype:
    """What torch's addition of these tensors would give."""
    dtype = base.dtype
    for state in states:
        dtype = torch.promote_types(dtype, state.dtype)
    return dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are accumulated in."""
    return torch.promote_types(dtype, torch.float32)


def plain_sum(
    base: Tensor, scale: Tensor | None, coefficients: Tensor, states: Sequence[Tensor]
) -> Tensor:
    """``scale · base + Σ_i coefficients_i · states_i`` in differentiable operations."""
    dtype = result_dtype(base, states)
    total = base.to(wide(dtype))
    if scale is not None:
        total = total * scale
    for coefficient, state in zip(coefficients.unbind(), states, strict=True):
        total = total + coefficient * state.to(total.dtype)
    return total.to(dtype)


def plain_pull(
    state: Tensor, gradient: Tensor | None, coefficients: Tensor, gradients: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What ``pull`` gives, in differentiable operations."""
    dtype = wide(result_dtype(state, gradients))
    start = torch.zeros_like(state) if gradient is None else gradient
    total = plain_sum(start.to(dtype), None, coefficients, gradients).to(state.dtype)
    products = [(each.to(dtype) * state.to(dtype)).sum() for each in gradients]
    return total, torch.stack(products)


def combine(
    base: Tensor, scale: Tensor | None, coefficients: Tensor, states: Sequence[Tensor]
) -> Tensor:
    """``scale · base + Σ_i coefficients_i · states_i``, outside of autograd.

    Args:
        base: Any shape.
        scale: A scalar, or None for one.
        coefficients: ``(n,)``, on the device of ``base``.
        states: ``n`` tensors of the shape of ``base``.

    Returns:
        A tensor with the memory format of ``base`` and the dtype that torch's addition gives.
    """
    if base.device.type != "cpu":
        return plain_sum(base, scale, coefficients, states)
    out = torch.empty_like(base, dtype=result_dtype(base, states))
    factors = _torch.floats(coefficients)
    factor = None if scale is None else scale.item()
    blocks = _blocks(out, [out, base, *states])
    scratch = _Scratch(out)
    for out_block, base_block, *state_blocks in blocks:
        total = scratch.total(out_block)
        if factor is None:
            total.copy_(base_block)
        else:
            torch.mul(scratch.widened(base_block), factor, out=total)
        for value, block in zip(factors, state_blocks, strict=True):
            total.add_(scratch.widened(block), alpha=value)
        scratch.store(total, out_block)
    return out


def pull(
    state: Tensor,
    gradient: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    *,
    need_state: bool = True,
    need_products: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one state and of its coefficients, from those of the sums it went into.

    Args:
        state: ``x``, any shape.
        gradient: What else reaches the gradient of ``x``; None for nothing.
        coefficients: ``(n,)``, on the device of ``state``.
        gradients: ``n`` gradients of the sums, of the shape of ``x``.
        need_state: Whether the first result is needed.
        need_products: Whether the second one is.

    Returns:
        ``gradient + Σ_i coefficients_i · gradients_i`` in the dtype of ``x``, and the
        ``⟨gradients_i, x⟩`` as ``(n,)``; None for what is not needed.
    """
    if state.device.type != "cpu":
        total, products = plain_pull(state, gradient, coefficients, gradients)
        return total if need_state else None, products if need_products else None
    factors = _torch.floats(coefficients)
    out = torch.empty_like(state)
    scratch = _Scratch(out, *gradients)
    sums = [0.0] * len(gradients)
    start = [] if gradient is None else [gradient]
    for out_block, state_block, *rest in _blocks(out, [out, state, *start, *gradients]):
        total = scratch.total(out_block)
        if gradient is None:
            total.zero_()
        else:
            total.copy_(rest.pop(0))
        values = scratch.kept(state_block) if need_products else state_block
        for index, block in enumerate(rest):
            wide_block = scratch.widened(block)
            if need_state:
                total.add_(wide_block, alpha=factors[index])
            if need_products:
                sums[index] += torch.dot(wide_block, values).item()
        scratch.store(total, out_block)
    products = torch.tensor(sums, dtype=coefficients.dtype) if need_products else None
    return out if need_state else None, products


class _Scratch:
    """Blocks in the dtype that sums are made in; made once, and only where the tensors differ."""

    def __init__(self, *tensors: Tensor) -> None:
        dtype = wide(result_dtype(tensors[0], tensors[1:]))
        self.dtype = dtype
        size = min(block_size(), tensors[0].numel())
        self._total, self._widened, self._kept = torch.empty(3, size, dtype=dtype).unbind()

    def total(self, out: Tensor) -> Tensor:
        return out if out.dtype == self.dtype else self._total[: out.numel()]

    def widened(self, block: Tensor) -> Tensor:
        return self._in(self._widened, block)

    def kept(self, block: Tensor) -> Tensor:
        return self._in(self._kept, block)

    def store(self, total: Tensor, out: Tensor) -> None:
        if total is not out:
            out.copy_(total)

    def _in(self, space: Tensor, block: Tensor) -> Tensor:
        if block.dtype == self.dtype:
            return block
        return space[: block.numel()].copy_(block)


def block_size() -> int:
    """Elements of a block: all threads of torch have work."""
    return BLOCK * torch.get_num_threads()


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; strides of size one do not count."""
    if one.stride() == other.stride():
        return True
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` itself if it lies in memory as ``like`` does, else a copy that does."""
    if same_layout(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _blocks(like: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of all tensors in step, in the order of memory. ``like`` is dense."""
    size = (like.numel(),)
    flat = [laid_out(tensor, like).as_strided(size, (1,)) for tensor in tensors]
    return zip(*(_torch.split(tensor, block_size()) for tensor in flat), strict=True)
