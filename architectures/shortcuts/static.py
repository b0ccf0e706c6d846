"""A fixed matrix of shortcuts, or a list of them such as ``0:2, 2:3``.

``i:j`` is the notation of arXiv 2602.09009: it adds state ``i`` to state ``j``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from architectures.shortcuts.base import Start, Support, Topology

#: A matrix, row by row, or the notation ``"0:2, 2:3=0.5"``.
Edges = str | Sequence[Sequence[float]]

_EDGE = re.compile(r"(?P<source>\d+):(?P<target>\d+)(?:=(?P<weight>\S+))?")


class Static(Topology):
    """Coefficients that do not train.

    Args:
        sites: Number of sites, K.
        edges: ``"i:j"`` adds state ``i`` to state ``j`` with coefficient 1, ``"i:j=c"`` with
            ``c``, for ``0 ≤ i < j ≤ K``; several are separated by commas. Or the matrix itself,
            ``(K, K)``, whose row ``k`` makes state ``k + 1``; with a last column that weights
            ``y_k``, ``(K, K + 1)``.
        init: ``uniform`` alone: the coefficients are what they are from the start.
        device: Where its tensor lives.

    Attributes:
        weights: The matrix, a buffer.

    Raises:
        ValueError: an edge cannot be read, is given twice or lies outside the stack, the matrix
            has another size, is not lower triangular or not finite, or ``init`` is ``identity``.
    """

    options: ClassVar[frozenset[str]] = frozenset({"edges"})
    inits: ClassVar[tuple[Start, ...]] = ("uniform",)

    weights: Tensor

    def __init__(
        self,
        sites: int,
        *,
        edges: Edges,
        init: Start | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        rows = _parsed(edges, sites) if isinstance(edges, str) else _checked(edges, sites)
        support: Support = tuple(
            tuple(state for state in range(sites) if row[state] != 0.0) for row in rows
        )
        super().__init__(sites, init=init, support=support)
        self._rows = rows
        empty = torch.empty(sites, len(rows[0]), dtype=torch.float32, device=device)
        self.register_buffer("weights", empty)
        self.reset_parameters()

    @classmethod
    def why(cls) -> str:
        """Why ``identity`` is refused."""
        return "its coefficients are constants; leave init out, or take a topology that learns"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The coefficients as they were given."""
        self.weights.copy_(torch.tensor(self._rows, dtype=torch.float32))

    def forward(self) -> Tensor:
        """The matrix, ``(K, K)`` or ``(K, K + 1)``."""
        return self.weights


def _parsed(notation: str, sites: int) -> list[list[float]]:
    """``"0:2, 2:3=0.5"`` as a matrix."""
    rows = [[0.0] * sites for _ in range(sites)]
    seen: set[tuple[int, int]] = set()
    for edge in filter(None, (part.strip() for part in notation.split(","))):
        source, target, weight = _edge(edge)
        if not source < target <= sites:
            raise ValueError(
                f"edge {edge!r} is outside the stack: i:j adds state i to a later state j, and "
                f"with {sites} sites the states are 0 to {sites}"
            )
        if (source, target) in seen:
            raise ValueError(f"edge {source}:{target} is given twice in {notation!r}")
        seen.add((source, target))
        rows[target - 1][source] = weight
    if not seen:
        raise ValueError(f"no edge in {notation!r}; expected a list such as '0:2, 2:3=0.5'")
    return rows


def _edge(edge: str) -> tuple[int, int, float]:
    match = _EDGE.fullmatch(re.sub(r"\s+", "", edge))
    if match is None:
        raise ValueError(f"cannot read edge {edge!r}; expected 'i:j' or 'i:j=coefficient'")
    try:
        weight = float(match["weight"] or 1.0)
    except ValueError:
        raise ValueError(f"the coefficient of edge {edge!r} is not a number") from None
    if not math.isfinite(weight):
        raise ValueError(f"the coefficient of edge {edge!r} is not finite")
    return int(match["source"]), int(match["target"]), weight


def _checked(matrix: Sequence[Sequence[float]], sites: int) -> list[list[float]]:
    """The matrix as floats, or an error that says what is wrong with it."""
    rows = [[float(value) for value in row] for row in matrix]
    widths = {len(row) for row in rows}
    if len(rows) != sites or widths not in ({sites}, {sites + 1}):
        got = f"{len(rows)} x {' or '.join(str(width) for width in sorted(widths)) or 0}"
        raise ValueError(
            f"the matrix is {got}, but the stack has {sites} sites: expected {sites} x {sites}, "
            f"or {sites} x {sites + 1} with the weights of what the blocks give"
        )
    for site, row in enumerate(rows):
        for state, value in enumerate(row):
            if not math.isfinite(value):
                raise ValueError(f"entry ({site}, {state}) of the matrix is {value}")
            if site < state < sites and value != 0.0:
                raise ValueError(
                    f"the matrix is not lower triangular: entry ({site}, {state}) is {value:g}, "
                    f"but state {state} does not exist yet when site {site} adds its shortcuts"
                )
    return rows
