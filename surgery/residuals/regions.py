"""Module calls in a graph: the runs of nodes that each of them made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn


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
        root: The module that the owners are paths in.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.root = Region("", None, 0)
        self.end: dict[Region, int] = {}
        self._module = root
        self._of: dict[fx.Node, Region] = {}
        current = self.root
        for at, node in enumerate(graph.nodes):
            current = self._enter(current, str(node.meta.get("owner", "")), at)
            self._of[node] = current
            region: Region | None = current
            while region is not None:
                self.end[region] = at
                region = region.parent

    def around(self, node: fx.Node, first: int) -> Region:
        """The innermost call that made ``node`` and everything from place ``first`` on."""
        region = self._of[node]
        while region.parent is not None and region.start > first:
            region = region.parent
        return region

    def _enter(self, current: Region, owner: str, at: int) -> Region:
        while current.parent is not None and not _within(owner, current.path):
            current = current.parent
        if current.path == owner:
            return current
        # The modules on the way to it may not have computed anything themselves yet.
        depth = current.path.count(".") + 1 if current.path else 0
        names = owner.split(".")
        for end in range(depth + 1, len(names) + 1):
            path = ".".join(names[:end])
            if end == len(names) or _is_called(self._module.get_submodule(path)):
                current = Region(path, current, at)
        return current


def _within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
