"""The learned graph: states on a line, the strong coefficients as arcs over it.

Node j is the state that enters block j, node K what leaves the last block. The coefficient of
site k for state j is an arc from node j to node k + 1; the blocks themselves are the chain below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.train.views import canvas
from surgery.train.views.canvas import Array, Axes, Figure
from surgery.train.views.matrices import Scale, add_scale, lower
from surgery.train.views.runs import Frames

#: Coefficients below this are not drawn unless asked for.
THRESHOLD = 0.1
_NUMBERS_IN_NODES = 24
_EXPLAINED = (
    "Node j: the state that enters block j. Above the line: from node j into the sum after block "
    "k, node k + 1.\nBelow the line: the blocks, one from each node to the next."
)
_SHORT = 8
"""Stacks of no more blocks than this stand two in a row."""


@dataclass(frozen=True)
class Edge:
    """One coefficient that is drawn: from node ``source`` to node ``target``."""

    source: int
    target: int
    weight: float


def strong_edges(matrix: Array, threshold: float) -> list[Edge]:
    """Entries with a magnitude of ``threshold`` or more, the weakest first.

    Args:
        matrix: ``(K, K)``; entries above the diagonal and those that are not finite do not count.
        threshold: Zero draws every entry that is not zero.
    """
    held = np.nan_to_num(np.tril(matrix), posinf=0.0, neginf=0.0)
    sites, states = np.nonzero((np.abs(held) >= threshold) & (held != 0))
    edges = [
        Edge(int(state), int(site) + 1, float(held[site, state]))
        for site, state in zip(sites, states, strict=True)
    ]
    return sorted(edges, key=lambda edge: abs(edge.weight))


def at_the_end(stacks: Sequence[Frames], threshold: float) -> Figure:
    """The graph of every stack at the last record."""
    deepest = max(frames.sites for frames in stacks)
    columns = 2 if len(stacks) > 1 and deepest <= _SHORT else 1
    rows = math.ceil(len(stacks) / columns)
    figure = canvas.new_figure(min(16.0, 6.5 + 0.2 * deepest) + 4.0 * (columns - 1), 3.3 * rows + 1)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(stacks) :]:
        axes.remove()
    grid = grid[: len(stacks)]
    scale = Scale.over([frames.values[-1] for frames in stacks])
    for axes, frames in zip(grid, stacks, strict=True):
        _draw_stack(axes, frames, scale, threshold)
    add_scale(figure, grid, scale)
    figure.suptitle(
        f"Learned connections at step {stacks[0].steps[-1]}: coefficients of magnitude "
        f"{threshold:g} or more",
        fontsize=11,
    )
    figure.supxlabel(_EXPLAINED, fontsize=9)
    return figure


def _draw_stack(axes: Axes, frames: Frames, scale: Scale, threshold: float) -> None:
    matrix = frames.values[-1]
    edges = strong_edges(matrix, threshold)
    colors, norm = scale.colors, scale.norm
    for edge in edges:
        width = 0.6 + 4.4 * abs(edge.weight) / scale.top
        _arc(axes, edge, frames.sites, colors(float(norm(edge.weight))), width)
    for block in range(frames.sites):
        _curve(
            axes, block, block + 1, _depth(frames.sites), color=canvas.GREY, linewidth=1.2, zorder=1
        )
    _nodes(axes, frames.sites)
    axes.set_xlim(-0.7, frames.sites + 0.7)
    highest = max((_height(edge, frames.sites) for edge in edges), default=0.5)
    axes.set_ylim(-0.28, max(0.5, 1.08 * highest))
    axes.axis("off")
    axes.set_title(f"{frames.stack}: {_told(matrix, edges)}", fontsize=10)


def _told(matrix: Array, edges: Sequence[Edge]) -> str:
    """How many edges are drawn, and how much of the weight they carry."""
    entries = lower(matrix)
    weight = float(np.nansum(np.abs(entries)))
    drawn = sum(abs(edge.weight) for edge in edges)
    share = f", {100 * drawn / weight:.0f}% of the weight" if weight else ""
    return f"{len(edges)} of {len(entries)} edges drawn{share}"


def _arc(axes: Axes, edge: Edge, sites: int, color: Any, width: float) -> None:
    # What takes away is dashed, since not everybody tells red from blue.
    style = "-" if edge.weight > 0 else (0, (3, 1.5))
    look = {"color": color, "linewidth": width, "linestyle": style, "zorder": 2}
    _curve(axes, edge.source, edge.target, _height(edge, sites), **look)


def _depth(sites: int) -> float:
    """How low the chain of blocks hangs: as round as the room between two nodes lets it."""
    return -0.16 if sites <= _NUMBERS_IN_NODES else -0.07


def _height(edge: Edge, sites: int) -> float:
    """Grows slower than the length: long arcs stay in the picture, short ones apart."""
    return ((edge.target - edge.source) / sites) ** 0.75


def _curve(axes: Axes, start: int, end: int, height: float, **look: Any) -> None:
    """A cubic Bézier from one node to another whose middle is ``height`` above the line."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    top = height / 0.75
    lean = 0.12 * (end - start)
    points = [(start, 0), (start + lean, top), (end - lean, top), (end, 0)]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    axes.add_patch(PathPatch(Path(points, codes), fill=False, capstyle="round", **look))


def _nodes(axes: Axes, sites: int) -> None:
    places = list(range(sites + 1))
    roomy = sites <= _NUMBERS_IN_NODES
    axes.scatter(
        places, [0] * len(places), s=190 if roomy else 22, c="white", edgecolors="black", zorder=3
    )
    labelled = places if roomy else canvas.ticks(sites + 1, 18)
    for place in labelled:
        height = 0.0 if roomy else _depth(sites) - 0.08
        axes.text(place, height, str(place), ha="center", va="center", fontsize=8, zorder=4)
