"""What calls of blocks, of the driver's own methods and of local functions do."""

from __future__ import annotations

import ast
import types
from typing import TYPE_CHECKING

from surgery.capture.loops.callees import name_pattern, python_function
from surgery.capture.loops.scanning.contents import is_module
from surgery.capture.loops.scanning.part import Part
from surgery.capture.loops.scopes import parameters
from surgery.capture.loops.values import NOTHING, LocalFunction, Value, join, without_parts

if TYPE_CHECKING:
    from surgery.capture.loops.scanning.scan import Scan


class Calls(Part):
    """Goes through calls.

    Args:
        scan: What they are part of.

    Attributes:
        unused: Expressions whose result is thrown away.
        entered: Functions defined inside the method that it calls.
    """

    def __init__(self, scan: Scan) -> None:
        super().__init__(scan)
        self.unused: set[ast.expr] = set()
        self.entered: set[LocalFunction] = set()

    def call(self, node: ast.Call) -> Value:
        """What a call gives."""
        called = self._scan.expressions.eval(node.func)
        values = [self._scan.expressions.eval(argument) for argument in node.args]
        named = {
            keyword.arg: self._scan.expressions.eval(keyword.value) for keyword in node.keywords
        }
        found: list[Value] = []
        if called.part and self.feeds(node, values, named):
            self._notes.run_part(node, called)
        if called.runnable:
            self._notes.run("call", node, called.runnable)
            self._notes.no_blocks_in([*values, *named.values()], node)
            return NOTHING
        if called.functions:
            found += [self._enter(one, values, named) for one in called.functions]
            return join(*found)
        if isinstance(node.func, ast.Attribute):
            shortcut = self._method_call(node, node.func, values)
            if shortcut is not None:
                return shortcut
        if isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            return self._super_call(node.func.attr, node, values, named)
        if called.own:
            found += [self._own_call(name, node, values, named) for name in called.own]
            return join(*found)
        items = called.items
        if items is not None and self._contents.containers(items) and not is_module(items):
            self._notes.may_run("a part of the stack is called as a module", node, called)
        return join(*found, self._scan.outside.call(node, called, values, named))

    def _method_call(
        self, node: ast.Call, callee: ast.Attribute, values: list[Value]
    ) -> Value | None:
        """Methods of containers, lists and dicts."""
        base = self._scan.expressions.eval(callee.value)
        name = callee.attr
        if name in {"append", "add", "insert", "appendleft", "extend", "update", "setdefault"}:
            given = join(*values)
            inner = self._driver.element(given) if name in {"extend", "update"} else given
            if self._contents.holds(given):
                self._scan.statements.put_into(callee.value, inner, node)
                return self._driver.element(base)
        if name in {"get_submodule", "__getattr__"} and base.paths and node.args:
            return self.get_attribute(base, node.args[0])
        if "" in base.paths and self._driver.method(name) is not None and not _is_view(name):
            return None
        return self._driver.method_result(base, name)

    def _own_call(
        self, name: str, node: ast.Call, values: list[Value], named: dict[str | None, Value]
    ) -> Value:
        """``self.name(...)``."""
        method = self._driver.method(name)
        function = python_function(method)
        if function is None:
            return self._scan.outside.call(node, NOTHING, values, named)
        if not any(self._contents.holds(value) for value in (*values, *named.values())):
            return self.result_of(function)
        bound = isinstance(method, types.FunctionType)
        return self._scan.outside.python_call(function, node, values, named, 1 if bound else 0)

    def _super_call(
        self, name: str, node: ast.Call, values: list[Value], named: dict[str | None, Value]
    ) -> Value:
        """``super().name(...)``: any of the ancestors' methods of that name."""
        if any(self._contents.leads(value) for value in (*values, *named.values())):
            return self._scan.outside.opaque(node, values, named)
        defined = [vars(ancestor).get(name) for ancestor in self._driver.cls.__mro__]
        functions = [python_function(one) for one in defined if one is not None]
        return join(*[self.result_of(one) for one in functions if one is not None])

    def _enter(
        self, function: LocalFunction, values: list[Value], named: dict[str | None, Value]
    ) -> Value:
        """A call of a function defined inside the method."""
        self.entered.add(function)
        names = parameters(function.args)
        for name, value in zip(names, values, strict=False):
            self._names.learn_in(function, name, value)
        for name, value in named.items():
            if name is not None:
                self._names.learn_in(function, name, value)
        return self._names.returns.get(function, NOTHING)

    def get_attribute(self, base: Value, name: ast.expr) -> Value:
        """``getattr(base, name)``."""
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            for part in name.value.split("."):
                base = (
                    self._driver.element(base)
                    if part.isdigit()
                    else self._driver.attribute(base, part)
                )
            return base
        return self._driver.named(base, name_pattern(name))

    def result_of(self, method: types.FunctionType) -> Value:
        """What a method or property of the driver returns."""
        function = python_function(method)
        if function is None or function.__code__ is self._scan.source.code:
            return NOTHING
        if not self._driver.mentions(function.__code__):
            return NOTHING
        known = self._scan.analyst.given(function, {0: Value(paths=frozenset({""}))})
        # What a helper makes of a block (an object it builds around one) is its own affair.
        return NOTHING if known is None else without_parts(known.returns)

    def feeds(self, node: ast.Call, values: list[Value], named: dict[str | None, Value]) -> bool:
        """Whether a call passes something besides blocks and its result is used.

        A call that gives a block nothing to work on, or throws its result away, sets something
        up; it does not run the block on a state.
        """
        if node in self.unused:
            return False
        given = [
            *zip(node.args, values, strict=True),
            *((keyword.value, named[keyword.arg]) for keyword in node.keywords),
        ]
        return any(
            not isinstance(argument, ast.Constant) and not self._contents.matters(value)
            for argument, value in given
        )


def _is_view(name: str) -> bool:
    return name in {"children", "named_children", "values", "items", "__iter__", "pop", "keys"}


def _is_super(node: ast.expr) -> bool:
    callee = node.func if isinstance(node, ast.Call) else None
    return isinstance(callee, ast.Name) and callee.id == "super"
