"""Which dtype sums are made in, and tensors seen as one run of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """What torch's addition of these tensors would give."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are made in."""
    return torch.promote_types(dtype, torch.float32)


def flat(like: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """All tensors as vectors whose elements are in the order that those of ``like`` have.

    Args:
        like: Dense: its elements fill one run of memory.
        tensors: Of its shape. One that does not lie in memory as ``like`` does is copied.
    """
    if not like.numel():
        return [tensor.reshape(-1) for tensor in tensors]
    return [laid_out(tensor, like).as_strided((like.numel(),), (1,)) for tensor in tensors]


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` itself if it lies in memory as ``like`` does, else a copy that does."""
    if _alike(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether the strides agree; that of a dimension of size one means nothing."""
    if one.stride() == other.stride():
        return True
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)
