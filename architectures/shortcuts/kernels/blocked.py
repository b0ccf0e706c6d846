"""The sums on the CPU, block by block.

A block of the result stays in the cache while the blocks of the states pass by, so that each
tensor crosses the memory bus once. A block is large enough that the time torch takes to start an
operation, and its threads to meet, does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from architectures.shortcuts import _torch
from architectures.shortcuts.kernels.layout import flat, result_dtype, wide_dtype

#: Elements of a block per thread: 512 KiB in float32.
BLOCK = 128 * 1024


def combine(
    base: Tensor, scale: Tensor | None, coefficients: Tensor, states: Sequence[Tensor]
) -> Tensor:
    """See the package."""
    out = torch.empty_like(base, dtype=result_dtype((base, *states)))
    factors = _torch.floats(coefficients)
    factor = None if scale is None else scale.item()
    scratch = _Scratch(wide_dtype(out.dtype))
    for out_block, base_block, *blocks in _blocks(out, [out, base, *states]):
        total = scratch.room("total", out_block)
        so_far = scratch.widened("base", base_block)
        if factor is not None:
            so_far = torch.mul(so_far, factor, out=total)
        for each, block in zip(factors, blocks, strict=True):
            so_far = torch.add(so_far, scratch.widened("state", block), alpha=each, out=total)
        _store(so_far, out_block)
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
    """See the package."""
    out = torch.empty_like(state)
    factors = _torch.floats(coefficients)
    scratch = _Scratch(wide_dtype(result_dtype((state, *gradients))))
    start = [] if gradient is None else [gradient]
    products: list[Tensor] = []
    for out_block, state_block, *rest in _blocks(out, [out, state, *start, *gradients]):
        total = scratch.room("total", out_block)
        if need_state and not start:
            total.zero_()
        so_far = scratch.widened("base", rest.pop(0)) if start else total
        values = scratch.widened("state", state_block) if need_products else state_block
        for factor, block in zip(factors, rest, strict=True):
            value = scratch.widened("gradient", block)
            if need_state:
                so_far = torch.add(so_far, value, alpha=factor, out=total)
            if need_products:
                products.append(torch.dot(value, values))
        if need_state:
            _store(so_far, out_block)
    sums = _summed(products, len(gradients), coefficients) if need_products else None
    return out if need_state else None, sums


def push(
    gradient: Tensor,
    coefficients: Tensor,
    states: Sequence[Tensor],
    *,
    need_states: Sequence[bool],
    need_products: bool,
) -> tuple[list[Tensor | None], Tensor | None]:
    """See the package."""
    like = torch.empty_like(gradient)
    outs = [torch.empty_like(like, dtype=state.dtype) for state in states]
    factors = _torch.floats(coefficients)
    scratch = _Scratch(wide_dtype(result_dtype((gradient, *states))))
    products: list[Tensor] = []
    for block, *rest in _blocks(like, [gradient, *states, *outs]):
        value = scratch.widened("gradient", block)
        state_blocks, out_blocks = rest[: len(states)], rest[len(states) :]
        for index, factor in enumerate(factors):
            if need_states[index]:
                torch.mul(value, factor, out=out_blocks[index])
            if need_products:
                state = scratch.widened("state", state_blocks[index])
                products.append(torch.dot(value, state))
    sums = _summed(products, len(states), coefficients) if need_products else None
    return [out if need else None for out, need in zip(outs, need_states, strict=True)], sums


class _Scratch:
    """Blocks in the dtype of the sums, for tensors of another dtype; made once they are needed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, block: Tensor) -> Tensor:
        """``block`` itself if it has the dtype, else room of its size, not filled."""
        if block.dtype == self._dtype:
            return block
        if name not in self._rooms:
            self._rooms[name] = torch.empty_like(block, dtype=self._dtype)
        return self._rooms[name][: block.numel()]

    def widened(self, name: str, block: Tensor) -> Tensor:
        """The values of ``block`` in the dtype."""
        room = self.room(name, block)
        return room if room is block else room.copy_(block)


def _store(values: Tensor, block: Tensor) -> None:
    if values is not block:
        block.copy_(values)


def _summed(products: list[Tensor], count: int, like: Tensor) -> Tensor:
    """Products of all blocks, ``count`` per block, as one sum for each."""
    return torch.stack(products).view(-1, count).sum(0, dtype=torch.float64).to(like.dtype)


def _blocks(like: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of all tensors in step, in the order of memory. ``like`` is dense."""
    size = BLOCK * torch.get_num_threads()
    whole = flat(like, tensors)
    if like.numel() <= size:
        return iter([tuple(whole)])
    return zip(*(_torch.split(tensor, size) for tensor in whole), strict=True)
