"""One adapter per slice of a fused weight, such as the query and the value part of a qkv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from architectures.adapters.base import Adapter, Method

#: Rows of a fused weight that belong to one slice, as half-open ranges in ascending order.
Ranges = tuple[tuple[int, int], ...]


class Sliced(Adapter):
    """Adapters of some of the rows of one weight, read together as a single one.

    The factors of the whole are A with those of the slices stacked, and B with those of the
    slices in blocks, each in the rows of its slice.

    Args:
        parts: Slice name → (its rows, its adapter). All have one scaling and one dropout.
        rows: Rows of the whole weight.
    """

    def __init__(self, parts: Mapping[str, tuple[Ranges, Method]], rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.ranges = {name: ranges for name, (ranges, _) in parts.items()}
        for name, (_, adapter) in parts.items():
            self.add_module(name, adapter)
            self.scaling = adapter.scaling
            self.dropout = adapter.dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (slices · rank, columns) and ``B`` (rows, slices · rank)."""
        As: list[Tensor] = []
        Bs: list[Tensor] = []
        for name, ranges in self.ranges.items():
            A, B = cast("Method", self.get_submodule(name)).factors()
            As.append(A)
            Bs.append(_spread(B, ranges, self.rows))
        return torch.cat(As), torch.cat(Bs, dim=1)


def _spread(B: Tensor, ranges: Ranges, rows: int) -> Tensor:
    """``B`` (rows of the slice, rank) put into its rows of a zero (rows, rank)."""
    pieces: list[Tensor] = []
    at, taken = 0, 0
    for start, stop in ranges:
        pieces.append(B.new_zeros(start - at, B.shape[1]))
        pieces.append(B[taken : taken + stop - start])
        at, taken = stop, taken + stop - start
    pieces.append(B.new_zeros(rows - at, B.shape[1]))
    return torch.cat(pieces)
