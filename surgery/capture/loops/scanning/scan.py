"""One function under analysis, gone through until nothing new is learnt."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING

from surgery.capture.loops.driver import WHOLE_BLOCK
from surgery.capture.loops.findings import Findings
from surgery.capture.loops.scanning.calls import Calls
from surgery.capture.loops.scanning.contents import Contents
from surgery.capture.loops.scanning.expressions import Expressions
from surgery.capture.loops.scanning.names import Names
from surgery.capture.loops.scanning.notes import Notes
from surgery.capture.loops.scanning.outside import Outside
from surgery.capture.loops.scanning.statements import Statements
from surgery.capture.loops.scopes import assigned, parameters
from surgery.capture.loops.source import Source
from surgery.capture.loops.values import NOTHING, Value

if TYPE_CHECKING:
    from surgery.capture.loops.scanning.analyst import Analyst

_ROUNDS = 12


class Scan:
    """One function under analysis.

    Args:
        analyst: Knows what other functions do.
        function: The function.
        source: Its text.
        constants: Parameters known to be true or false in the call that is meant.
    """

    def __init__(
        self,
        analyst: Analyst,
        function: types.FunctionType,
        source: Source,
        constants: dict[str, bool],
    ) -> None:
        self.analyst = analyst
        self.driver = analyst.driver
        self.function = function
        self.source = source
        self.contents = Contents(self.driver)
        self.notes = Notes(self.contents)
        self.names = Names(source.node, self.notes)
        changing = assigned(source.node)
        lasting = {name: value for name, value in constants.items() if name not in changing}
        self.statements = Statements(self, lasting)
        self.expressions = Expressions(self)
        self.calls = Calls(self)
        self.outside = Outside(self)

    def run(self, arguments: dict[int, Value]) -> Findings:
        """Interpret the function until nothing new is learnt."""
        node = self.source.node
        names = parameters(node.args)
        for index, value in arguments.items():
            if index < len(names):
                self.names.learn(names[index], value)
        self.names.changed, rounds = True, 0
        while self.names.changed and rounds < _ROUNDS:
            self.names.changed, rounds = False, rounds + 1
            self.notes.anew()
            self.statements.body_of(node)
        if self.names.changed:
            self.notes.may_run("where blocks go is too entangled to be told", node, WHOLE_BLOCK)
        self.notes.findings.returns = self.names.returns.get(node, NOTHING)
        self._check_entered()
        return self.notes.findings

    def _check_entered(self) -> None:
        """A function around a block is either handed to another or called, not both."""
        why = "a function around a block is handed on and called as well"
        for function in self.calls.entered & self.outside.handed.keys():
            self.notes.may_run(why, function, Value(blocks=self.outside.handed[function]))
