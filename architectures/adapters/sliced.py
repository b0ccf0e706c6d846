"""One adapter per slice of a fused weight, such as the query and the value part of a qkv."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
            self.scales_rows = adapter.scales_rows
        begins = any(adapter.beginning is not None for _, adapter in parts.values())
        # In a tuple: it is no child, its tensors are those of the slices.
        self._begun = (_Beginnings(self),) if begins else ()

    @property
    def methods(self) -> tuple[Method, ...]:
        """One for each slice."""
        return tuple(method for _, method in self.parts.values())

    @property
    def beginning(self) -> Adapter | None:
        """What was taken out of the weight at the start, as an adapter; None if nothing was."""
        return self._begun[0] if self._begun else None

    @property
    def parts(self) -> dict[str, tuple[Ranges, Method]]:
        """Slice name → (its rows, its adapter)."""
        return {
            name: (ranges, cast("Method", self.get_submodule(name)))
            for name, ranges in self.ranges.items()
        }

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (slices · rank, columns) and ``B`` (rows, slices · rank)."""
        return _stacked(self.parts.values(), self.rows)

    def gain(self, weight: Tensor) -> Tensor:
        """That of each slice in its rows, and one elsewhere; ``(rows,)``.

        Args:
            weight: The base weight as ``(rows, columns)``.
        """
        gains = [
            _spread(adapter.gain(torch.cat([weight[a:b] for a, b in ranges])), ranges, self.rows, 1)
            for ranges, adapter in self.parts.values()
        ]
        # Slices do not overlap: in each row all factors but one are 1.
        return torch.stack(gains).prod(0)


class _Beginnings(Adapter):
    """What the slices took out of their rows at the start."""

    def __init__(self, sliced: Sliced) -> None:
        super().__init__()
        self.scaling = sliced.scaling
        self.dropout = 0.0
        self._of = (sliced,)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A₀`` (slices · rank, columns) and ``B₀`` (rows, slices · rank)."""
        sliced = self._of[0]
        begun = [
            (ranges, adapter.beginning)
            for ranges, adapter in sliced.parts.values()
            if adapter.beginning is not None
        ]
        return _stacked(begun, sliced.rows)


def _stacked(parts: Iterable[tuple[Ranges, Adapter]], rows: int) -> tuple[Tensor, Tensor]:
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    for ranges, adapter in parts:
        A, B = adapter.factors()
        As.append(A)
        Bs.append(_spread(B, ranges, rows))
    return torch.cat(As), torch.cat(Bs, dim=1)


def _spread(B: Tensor, ranges: Ranges, rows: int, elsewhere: float = 0) -> Tensor:
    """``B`` (rows of the slice, ...) put into its rows of a constant (rows, ...)."""
    pieces: list[Tensor] = []
    at, taken = 0, 0
    for start, stop in ranges:
        pieces.append(B.new_full((start - at, *B.shape[1:]), elsewhere))
        pieces.append(B[taken : taken + stop - start])
        at, taken = stop, taken + stop - start
    pieces.append(B.new_full((rows - at, *B.shape[1:]), elsewhere))
    return torch.cat(pieces)
