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
        graph: With ``calls`` on its nodes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.root = Region("", None, 0)
        self.end: dict[Region, int] = {}
        self._of: dict[fx.Node, Region] = {}
        running = [self.root]
        for at, node in enumerate(graph.nodes):
            self._follow(running, _calls(node), at)
            self._of[node] = running[-1]
            self.end.update(dict.fromkeys(running, at))

    def around(self, node: fx.Node, first: int) -> Region:
        """The innermost call that made ``node`` and everything from place ``first`` on."""
        region = self._of[node]
        while region.parent is not None and region.start > first:
            region = region.parent
        return region

    @staticmethod
    def _follow(running: list[Region], calls: tuple[str, ...], at: int) -> None:
        """Leave the calls that have ended and enter those that have begun."""
        shared = 1
        for region, path in zip(running[1:], calls, strict=False):
            if region.path != path:
                break
            shared += 1
        del running[shared:]
        for path in calls[shared - 1 :]:
            running.append(Region(path, running[-1], at))


def _calls(node: fx.Node) -> tuple[str, ...]:
    """The paths of the calls that a node was made in, that of the root left out."""
    calls: tuple[str, ...] = node.meta.get("calls", ())
    return calls[1:]
