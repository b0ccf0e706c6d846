"""Where residuals lie: in which layer of which stack, and in which run of one shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from surgery.residuals.residual import Residual

T = TypeVar("T")


@dataclass(frozen=True)
class ResidualStack:
    """Residuals that follow one another on one stream, which keeps its shape.

    Attributes:
        sites: In the order they run; the output of each leads to the shortcut of the next.
        shape: Shape of the state at the example.
    """

    sites: tuple[Residual, ...]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sites)


def place(residual: Residual, layers: Mapping[str, T]) -> T | None:
    """What is known about the innermost layer that a residual lies in; None if it lies in none.

    Args:
        residual: Of a whole model.
        layers: By path, such as ``ModelMap.index(stacks)``: path → (stack, index of the layer).
    """
    path = residual.block
    while path not in layers:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return layers[path]


def residual_stacks(residuals: Iterable[Residual]) -> tuple[ResidualStack, ...]:
    """Runs of residuals whose state keeps its shape, in the order they start.

    A run is cut where the shape changes, and where the state goes through anything but single
    tensors, such as the concatenation with a long skip.

    Args:
        residuals: Of one graph.
    """
    sites = list(residuals)
    by_node = {site.node: site for site in sites}
    after: dict[Residual, Residual] = {}
    for site in sites:  # of several that follow, the last to run is the outermost
        previous = None if site.follows is None else by_node.get(site.follows)
        if previous is not None and site.continues:
            after[previous] = site
    continued = set(after.values())
    return tuple(_run(site, after) for site in sites if site not in continued)


def _run(head: Residual, after: Mapping[Residual, Residual]) -> ResidualStack:
    run = [head]
    while run[-1] in after:
        run.append(after[run[-1]])
    return ResidualStack(tuple(run), head.shape)
