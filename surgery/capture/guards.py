"""Guards: what the Python of a forward asked to know, and what it was told."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from surgery.capture.where import Where


@dataclasses.dataclass(frozen=True, slots=True)
class Guard:
    """One value that Python demanded while a forward was traced.

    The graph is right for as long as ``expression`` still gives ``expected``.

    Attributes:
        kind: How the value was demanded: ``bool``, ``int``, ``float``, ``str``, ``hash``, ``len``,
            ``none``, ``attribute`` when a module or its config holds it, a tensor attribute such as
            ``dtype``, or ``data`` when it took the contents of a tensor.
        expression: What was demanded, as Python over the names of the graph's nodes.
        expected: The value it had.
        file: Source file of the statement that demanded it.
        line: 1-based line in that file.
        owner: Dotted path of the module whose forward was running.
        assumed: The value was made up: it depends on data that was not there (meta device) or
            too expensive to compute. The trace is one that the model can take, not
            necessarily the one it takes.
        node: The node that has the value, where the graph has one.
    """

    kind: str
    expression: str
    expected: Any
    file: str
    line: int
    owner: str
    assumed: bool = False
    node: fx.Node | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def where(self) -> Where:
        """``file:line`` of the statement that demanded the value."""
        return Where(f"{self.file}:{self.line}")

    def __str__(self) -> str:
        told = "assumed" if self.assumed else self.kind
        return f"{self.expression} == {self.expected!r} ({told}, {self.where})"


def expect(value: Any, expected: Any) -> None:
    """Marks a guard in the graph of a captured forward; ``meta["guard"]`` is the `Guard`."""


def assign(path: str, value: Any) -> None:
    """Marks ``self.path = value`` in the graph of a captured forward."""
