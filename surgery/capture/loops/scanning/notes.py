"""What a scan finds, written down while it goes through the function."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from surgery.capture.loops.findings import Findings, Kind, Run, Trouble
from surgery.capture.loops.scanning.contents import Contents, is_module
from surgery.capture.loops.values import NOTHING, Value


class Notes:
    """The notes of one scan.

    Args:
        contents: Tells what blocks a value holds.

    Attributes:
        findings: What was found in this round.
        loops: The loops around the statement that is looked at, the innermost last.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self.findings = Findings()
        self.loops: list[ast.AST] = []

    def anew(self) -> None:
        """Begin another round; what is known of attributes stays."""
        self.findings = Findings(aliases=self.findings.aliases)

    def run(
        self, kind: Kind, node: ast.Call, containers: frozenset[str], block: str | None = None
    ) -> Value:
        """A call runs a block."""
        self.findings.runs[node] = Run(kind, node, containers, block)
        return NOTHING

    def may_run(self, why: str, node: ast.AST, value: Value) -> Value:
        """Something may run a block in a way that cannot be followed."""
        self.trouble(why, node, value, runs=True)
        return NOTHING

    def run_part(self, node: ast.Call, value: Value) -> None:
        """A call runs a part of a block."""
        why = "a part of a block is run by itself"
        loop = self.loops[-1] if self.loops else None
        trouble = Trouble(why, node, loop, True, value.part, aside=loop is None)
        self.findings.troubles[node, why] = trouble

    def keep(self, why: str, node: ast.AST, value: Value) -> None:
        """A block is kept where it cannot be followed."""
        self.trouble(why, node, value, runs=False)

    def trouble(
        self, why: str, node: ast.AST, value: Value, *, runs: bool, inside: bool = False
    ) -> None:
        """Something cannot be followed; see `Trouble`."""
        loop = self.loops[-1] if self.loops else None
        containers = self._contents.containers(value)
        trouble = Trouble(why, node, loop, runs, containers, inside=inside)
        self.findings.troubles[node, why] = trouble

    def no_blocks_in(self, values: Iterable[Value], node: ast.Call) -> None:
        """Take note of the blocks among the arguments of a block."""
        for value in values:
            if self._contents.holds(value) and not is_module(value):
                self.may_run("a block is an argument of a block", node, value)
