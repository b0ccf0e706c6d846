"""What a conversion writes: files, the tensors in them, and where each of those begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from surgery.checkpoints import tensorfile


@dataclass(frozen=True, eq=False)
class OutFile:
    """One safetensors file to be written.

    Attributes:
        name: Its name in the folder.
        tensors: What it holds, in order; only dtypes and shapes are looked at.
    """

    name: str
    tensors: tuple[tuple[str, Tensor], ...]

    @classmethod
    def of(cls, name: str, tensors: Iterable[tuple[str, Tensor]]) -> OutFile:
        """A file of tensors, ordered as ``surgery.save`` orders them."""
        return cls(name, tuple(tensorfile.in_order(list(tensors))))

    @cached_property
    def header(self) -> bytes:
        """The beginning of the file."""
        return tensorfile.header_bytes(self.tensors)

    @cached_property
    def starts(self) -> Mapping[str, int]:
        """Name → the byte of the file at which the tensor begins."""
        found: dict[str, int] = {}
        at = len(self.header)
        for name, tensor in self.tensors:
            found[name] = at
            at += tensor.nbytes
        return found

    @cached_property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return len(self.header) + sum(tensor.nbytes for _, tensor in self.tensors)


@dataclass(frozen=True)
class Spot:
    """Where in the new files a tensor, or a part of one, goes: from a byte of a file on."""

    file: OutFile
    start: int


def spots_of(files: Iterable[OutFile]) -> dict[str, Spot]:
    """Name → where it goes, of every tensor of some files."""
    return {name: Spot(file, start) for file in files for name, start in file.starts.items()}


def empty(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the meta device, which stands for one that is not made yet."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def contiguous_block(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> int | None:
    """Where ``tensor[index]`` begins in a tensor in C order, in elements.

    Returns:
        None if the block does not lie there in one piece.
    """
    at, whole_from_here = 0, False
    for axis, each in enumerate(index):
        below = math.prod(shape[axis + 1 :])
        start, stop, step = (
            each.indices(shape[axis]) if isinstance(each, slice) else (each, each + 1, 1)
        )
        partial = (start, stop) != (0, shape[axis])
        if step != 1 or (partial and whole_from_here):
            return None
        at += start * below
        whole_from_here = whole_from_here or stop - start > 1
    return at
