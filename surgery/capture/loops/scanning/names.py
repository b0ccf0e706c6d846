"""What the names of a function may stand for, and what functions inside it may return."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Generator, Iterable

from surgery.capture.loops.scanning.notes import Notes
from surgery.capture.loops.scopes import Scope, names_of
from surgery.capture.loops.values import NOTHING, LocalFunction, Value, join


class Names:
    """The names of one scan.

    Args:
        function: The syntax tree of the function that is scanned.
        notes: Takes note of what is stored outside of it.

    Attributes:
        scope: That of the statement that is looked at.
        within: The functions around it, the innermost last.
        returns: What functions may return.
        makers: Function or lambda → the one inside which it is made.
        changed: Whether anything was learnt in this round.
    """

    def __init__(self, function: ast.FunctionDef, notes: Notes) -> None:
        self._function = function
        self._notes = notes
        self._scopes: dict[ast.AST, Scope] = {}
        self.scope = Scope((), None)
        self.within: list[ast.AST] = []
        self.returns: dict[ast.AST, Value] = {}
        self.makers: dict[LocalFunction, LocalFunction] = {}
        self.changed = False
        self.scope = self.scope_of(function)

    @contextlib.contextmanager
    def inside(self, function: LocalFunction) -> Generator[None]:
        """Statements are those of a function."""
        outer, loops = self.scope, self._notes.loops
        self.scope, self._notes.loops = self.scope_of(function), []
        if self.within and isinstance(self.within[-1], LocalFunction):
            self.makers[function] = self.within[-1]
        self.within.append(function)
        yield
        self.within.pop()
        self.scope, self._notes.loops = outer, loops

    def scope_of(self, node: ast.AST, names: Iterable[str] | None = None) -> Scope:
        """The scope of a function or comprehension, inside the present one when first asked for."""
        if node not in self._scopes:
            found = names_of(node) if names is None else names
            self._scopes[node] = Scope(found, self.scope)
        return self._scopes[node]

    def learn(self, name: str, value: Value) -> None:
        """A name may stand for ``value``."""
        scope = self.scope.holder(name)
        if value == NOTHING:
            return
        if scope is None:
            self._notes.keep(f"a block is stored in the global {name}", self._function, value)
            return
        joined = join(scope.values[name], value)
        if joined != scope.values[name]:
            scope.values[name] = joined
            self.changed = True

    def is_local(self, name: str) -> bool:
        """Whether a name belongs to the function or to one inside it."""
        return self.scope.holder(name) is not None

    def learn_in(self, node: LocalFunction, name: str, value: Value) -> None:
        """The same for a parameter of a function defined inside."""
        outer, self.scope = self.scope, self.scope_of(node)
        if name in self.scope.values:
            self.learn(name, value)
        self.scope = outer

    def give(self, node: ast.AST, value: Value) -> None:
        """A function may return ``value``."""
        joined = join(self.returns.get(node, NOTHING), value)
        if joined != self.returns.get(node, NOTHING):
            self.returns[node] = joined
            self.changed = True
