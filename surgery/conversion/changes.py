"""``W + share · scaling · B A``, a few rows of W at a time, as a merge in memory computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from architectures.adapters import Adapter, Matrix, Method


@dataclass(frozen=True, eq=False)
class Merge:
    """What adapters make of one weight.

    Attributes:
        matrix: How the weight is read as a matrix, or as a stack of matrices.
        adding: The adapters with their shares.
        settling: Adapters whose start is taken out of the weight first, as it was when they were
            trained: ``W - s B₀ A₀``, rounded to the dtype the weight had then.
        beside: That dtype, where it is wider than the stored weight's.
    """

    matrix: Matrix
    adding: Sequence[tuple[Adapter, float]]
    settling: Sequence[Method] = ()
    beside: torch.dtype | None = None

    @property
    def by_rows(self) -> bool:
        """Whether a few rows can be changed without the others being known."""
        if not self._gains and not self.settling:
            return True
        plain = not self.matrix.stack and not self.matrix.transposed
        return plain and all(isinstance(each, Method) for each, _ in self.adding)

    @property
    def columns(self) -> int:
        """Elements of one row as it is stored."""
        return self.matrix.rows if self.matrix.transposed else self.matrix.columns

    @torch.no_grad()
    def whole(self, weight: Tensor) -> Tensor:
        """The changed weight, in float32 at least.

        Args:
            weight: As it is stored.
        """
        base = self.matrix.fold(self._as_trained(weight))
        for method in self.settling:
            base = method.without_beginning(base)
        wide = torch.promote_types(weight.dtype, torch.float32)
        folded = base.to(wide)
        changed = folded
        for adapter, share in self.adding:
            changed = changed + share * adapter.change(folded, dtype=wide)
        return self.matrix.unfold(changed)

    def rows(self, weight: Tensor, first: int, room: Tensor) -> Tensor:
        """Some rows of the changed weight, in float32 at least.

        Args:
            weight: ``(n, columns)``, rows of the stored weight, those of all matrices of a stack
                counted on.
            first: The number of the first of them.
            room: ``(n, columns)``, of the dtype that the weight is added up in; may be what is
                given back.
        """
        if self._gains or self.settling:
            return self._parts(weight, first)
        wide = room.dtype
        changed = room.copy_(weight)
        for factors, (adapter, share) in zip(self._factors, self.adding, strict=True):
            for left, right, at in _pieces(factors, first, len(weight), self._rows_each):
                # In one pass, which rounds once less than a product that is scaled and added.
                alpha = adapter.scaling * share
                changed[at : at + len(left)].addmm_(left.to(wide), right.to(wide), alpha=alpha)
        return changed

    def _as_trained(self, weight: Tensor) -> Tensor:
        if self.beside is None or not self.settling:
            return weight
        return weight.to(torch.promote_types(weight.dtype, self.beside))

    @property
    def _gains(self) -> bool:
        return any(adapter.scales_rows for adapter, _ in self.adding)

    @property
    def _rows_each(self) -> int:
        """Rows of one matrix of the stack, as they are stored."""
        return self.matrix.columns if self.matrix.transposed else self.matrix.rows

    @cached_property
    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """Per adapter ``(stack, rows, rank)`` and ``(stack, rank, columns)`` of stored rows."""
        found: list[tuple[Tensor, Tensor]] = []
        for adapter, _ in self.adding:
            A, B = adapter.factors()
            left, right = (A.mT, B.mT) if self.matrix.transposed else (B, A)
            # Once in float32: each chunk of rows needs them.
            each = (tensor.detach().float() for tensor in (left, right))
            left, right = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in each)
            found.append((left, right))
        return found

    def _parts(self, weight: Tensor, first: int) -> Tensor:
        stop = first + len(weight)
        weight = self._as_trained(weight)
        for method in self.settling:
            weight = _part(method, self.matrix, first, stop).without_beginning(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        base = weight.to(wide)
        changed = base
        for adapter, share in self.adding:
            # Of one method each: see by_rows.
            part = _part(cast("Method", adapter), self.matrix, first, stop)
            changed = changed + share * part.change(base, dtype=wide)
        return changed


def _pieces(
    factors: tuple[Tensor, Tensor], first: int, count: int, each: int
) -> list[tuple[Tensor, Tensor, int]]:
    """What rows of a stack are the product of: left rows, right factor, and where they go."""
    left, right = factors
    found: list[tuple[Tensor, Tensor, int]] = []
    at = 0
    while at < count:
        index, row = divmod(first + at, each)
        taken = min(count - at, each - row)
        found.append((left[index, row : row + taken], right[index], at))
        at += taken
    return found


def _part(method: Method, matrix: Matrix, start: int, stop: int) -> Method:
    """A method for some rows of its matrix: its tensors, those with a dimension of rows cut."""
    narrow = Matrix.of((stop - start, matrix.columns), stacked=False)
    made = type(method)(
        narrow,
        rank=method.rank,
        scaling=method.scaling,
        options=method.options,
        device="meta",
        dtype=method.lora_A.dtype,
    )
    full = {**method.tensors(matrix, method.rank)}
    full |= method.constants(matrix, method.rank, method.options)
    cut = {**method.tensors(narrow, method.rank)}
    cut |= method.constants(narrow, method.rank, method.options)
    for name, shape in full.items():
        tensor: Tensor = getattr(method, name).detach()
        axis = next((i for i, size in enumerate(shape) if size != cut[name][i]), None)
        value = tensor if axis is None else tensor.narrow(axis, start, stop - start)
        if isinstance(getattr(method, name), nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(made, name, value)
    return made
