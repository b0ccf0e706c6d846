"""Module calls in a graph: the runs of nodes that each of them made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True, eq=False)
class Region:
    """The nodes that one call of a module made, those of its children included.

    Attributes:
        path: The module.
        parent: The call it was made in; None for the root.
        start: Place in the graph of its first node.
    """

    path: str
    parent: Region | None
    start: int


class Regions:
    """The calls of a graph. Two calls of a module with nothing between them count as one.

    Args:
        graph: With an ``owner`` on its nodes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.root = Region("", None, 0)
        self._of: dict[fx.Node, Region] = {}
        self.end: dict[Region, int] = {}
        current = self.root
        for at, node in enumerate(graph.nodes):
            current = self._enter(current, str(node.meta.get("owner", "")), at)
            self._of[node] = current
            region: Region | None = current
            while region is not None:
                self.end[region] = at
                region = region.parent

    def of(self, node: fx.Node) -> Region:
        """The innermost call that made a node."""
        return self._of[node]

    def around(self, node: fx.Node, first: int) -> Region:
        """The innermost call that made ``node`` and everything from place ``first`` on."""
        region = self._of[node]
        while region.parent is not None and region.start > first:
            region = region.parent
        return region

    def _enter(self, current: Region, owner: str, at: int) -> Region:
        while current.parent is not None and not _within(owner, current.path):
            current = current.parent
        return current if current.path == owner else Region(owner, current, at)


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")
