"""What an edit of ``lowrank`` says, in its payload: where the weight is and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from architectures.adapters import Adapter, Matrix, Method, Ranges, Sliced
from surgery.passes.hosts import Place
from surgery.record import Edit


def joined(path: str, name: str) -> str:
    """A dotted path with a name behind it; the root's path is empty."""
    return f"{path}.{name}" if path else name


def parts_of(prefix: str, matrix: Matrix, slices: dict[str, Ranges]) -> list[tuple[str, Matrix]]:
    """Name of every adapter of an edit, and the matrix it changes."""
    if not slices:
        return [(prefix, matrix)]
    return [
        (f"{prefix}.{name}", Matrix.of((_rows(ranges), matrix.columns), stacked=False))
        for name, ranges in slices.items()
    ]


def _rows(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def ranges_of(features: tuple[int, int] | list[int]) -> Ranges:
    """Output features as ascending half-open ranges."""
    if isinstance(features, tuple):
        return (features,)
    ranges: list[tuple[int, int]] = []
    for index in sorted(features):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def places_of(edit: Edit) -> list[Place]:
    """The modules that share the weight."""
    return [Place(*each) for each in edit.payload["places"]]


def matrix_data(matrix: Matrix) -> dict[str, Any]:
    """How the weight is read, JSON-able."""
    return {
        "shape": list(matrix.shape),
        "stack": list(matrix.stack),
        "rows": matrix.rows,
        "columns": matrix.columns,
        "transposed": matrix.transposed,
    }


def matrix_of(edit: Edit) -> Matrix:
    """How the weight is read, from ``matrix_data``."""
    fields = edit.payload["matrix"]
    return Matrix(
        shape=tuple(fields["shape"]),
        stack=tuple(fields["stack"]),
        rows=fields["rows"],
        columns=fields["columns"],
        transposed=fields["transposed"],
    )


def slices_of(edit: Edit) -> dict[str, Ranges]:
    """Name → rows of the slices that have adapters of their own; empty for the whole weight."""
    slices = cast("dict[str, list[list[int]]]", edit.payload["slices"])
    return {name: tuple((a, b) for a, b in pairs) for name, pairs in slices.items()}


def whole(edit: Edit, made: Mapping[str, Method]) -> Adapter:
    """The adapter of an edit from its methods, one for each slice."""
    slices = slices_of(edit)
    if not slices:
        return next(iter(made.values()))
    parts = {
        name: (ranges, adapter)
        for (name, ranges), adapter in zip(slices.items(), made.values(), strict=True)
    }
    return Sliced(parts, matrix_of(edit).rows)
