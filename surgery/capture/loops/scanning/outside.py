"""What calls of things defined elsewhere do: do they run the blocks that they are given?"""

from __future__ import annotations

import ast
import functools
import itertools
import types
from typing import TYPE_CHECKING, Any

from surgery.capture.loops.callees import (
    CHAIN_FROM,
    GATHERING,
    INSPECTING,
    SEQUENCES,
    UNKNOWN,
    applies,
    constant_arguments,
    is_partial,
    python_function,
    resolve,
)
from surgery.capture.loops.closures import block_name, passes_on
from surgery.capture.loops.driver import WHOLE_BLOCK
from surgery.capture.loops.findings import Run
from surgery.capture.loops.scanning.contents import is_module
from surgery.capture.loops.scanning.part import Part
from surgery.capture.loops.scopes import parameters
from surgery.capture.loops.values import (
    NOTHING,
    LocalFunction,
    Value,
    items_of,
    join,
    tuple_of,
)

if TYPE_CHECKING:
    from surgery.capture.loops.scanning.scan import Scan


class Outside(Part):
    """Goes through calls of what is defined outside of the function.

    Args:
        scan: What they are part of.

    Attributes:
        handed: Functions around a block that another is handed → the containers of the block.
    """

    def __init__(self, scan: Scan) -> None:
        super().__init__(scan)
        self.handed: dict[LocalFunction, frozenset[str]] = {}

    def call(
        self,
        node: ast.Call,
        called: Value,
        values: list[Value],
        named: dict[str | None, Value],
    ) -> Value:
        """A call of something defined elsewhere."""
        target = self._target(node)
        if target is getattr and len(node.args) >= 2:
            return join(self._scan.calls.get_attribute(values[0], node.args[1]), *values[2:])
        if target is not UNKNOWN:
            known = self._known(target, node, values)
            if known is not None:
                return known
        holding = [value for value in (*values, *named.values()) if self._contents.matters(value)]
        if not holding:
            return NOTHING
        if is_partial(target):
            return self._partial(node, values, named)
        return self._unknown_call(target, node, called, values, named)

    def _target(self, node: ast.Call) -> Any:
        callee = node.func
        if (
            isinstance(callee, ast.Attribute)
            and "" in self._scan.expressions.eval(callee.value).paths
        ):
            return self._driver.static(callee.attr)
        return resolve(callee, self._scan.function, self._names.is_local)

    def _known(self, target: Any, node: ast.Call, values: list[Value]) -> Value | None:
        if target in INSPECTING:
            return NOTHING
        first = values[0] if values else NOTHING
        if target in GATHERING:
            return items_of(self._driver.element(first))
        if target is next:
            return join(self._driver.element(first), *values[1:])
        if target is enumerate:
            return items_of(tuple_of(NOTHING, self._driver.element(first)))
        if target is zip or target is itertools.zip_longest:
            return items_of(tuple_of(*[self._driver.element(value) for value in values]))
        if target is CHAIN_FROM:
            return items_of(self._driver.element(self._driver.element(first)))
        if target is itertools.chain:
            return items_of(join(*[self._driver.element(value) for value in values]))
        if target is dict:
            return items_of(join(*[self._driver.element(self._driver.element(v)) for v in values]))
        if target is map or target is filter:
            return self._map(target, values)
        if target is functools.reduce and len(values) > 1:
            for one in first.functions:
                names = parameters(one.args)
                self._names.learn_in(one, names[-1], self._driver.element(values[1]))
            return NOTHING if first.functions else None
        return None

    def _map(self, target: Any, values: list[Value]) -> Value:
        elements = [self._driver.element(value) for value in values[1:]]
        results: list[Value] = []
        for one in values[0].functions:
            for name, element in zip(parameters(one.args), elements, strict=False):
                self._names.learn_in(one, name, element)
            results.append(self._names.returns.get(one, NOTHING))
        return items_of(join(*elements) if target is filter else join(*results))

    def _partial(
        self, node: ast.Call, values: list[Value], named: dict[str | None, Value]
    ) -> Value:
        """``partial(block, ...)`` runs the block when it is called."""
        if values and values[0].runnable and not any(map(self._contents.holds, values[1:])):
            self._notes.no_blocks_in(named.values(), node)
            return Value(bound=values[0].runnable)
        holding = join(*values, *named.values())
        if values and not self._contents.holds(values[0]) and not values[0].functions:
            return self._notes.may_run("a block is bound to a function by partial", node, holding)
        return self._notes.may_run("partial of a function around a block", node, holding)

    def _unknown_call(
        self,
        target: Any,
        node: ast.Call,
        called: Value,
        values: list[Value],
        named: dict[str | None, Value],
    ) -> Value:
        first = values[0] if values else NOTHING
        rest = [*values[1:], *named.values()]
        alone = not any(self._contents.matters(value) for value in rest)
        starred = bool(node.args) and isinstance(node.args[0], ast.Starred)
        if alone and not starred:
            if first.runnable and applies(target) and self._scan.calls.feeds(node, values, named):
                return self._notes.run("through", node, first.runnable)
            if first.functions and self._runs_inside(first):
                return self._around(node, first)
            if first.functions:
                return NOTHING
            if target in SEQUENCES:
                return self._sequence(node, first, plain=True)
            if is_module(first) and applies(target):
                return NOTHING
        function = python_function(target)
        if function is not None:
            return self.python_call(function, node, values, named, 0)
        if isinstance(target, types.BuiltinFunctionType):
            return NOTHING  # written in C: it cannot run a module
        if isinstance(target, type):
            given = join(
                *[value for value in (*values, *named.values()) if self._contents.matters(value)]
            )
            return Value(part=self._contents.containers(given))
        return self.opaque(node, values, named)

    def python_call(
        self,
        function: types.FunctionType,
        node: ast.Call,
        values: list[Value],
        named: dict[str | None, Value],
        shift: int,
    ) -> Value:
        """A call of a function whose text can be read: does it run what it is given?"""
        names = list(function.__code__.co_varnames[: function.__code__.co_argcount])
        given = {i + shift: value for i, value in enumerate(values) if self._contents.leads(value)}
        given |= {
            names.index(name): value
            for name, value in named.items()
            if name in names and self._contents.leads(value)
        }
        led = [value for value in (*values, *named.values()) if self._contents.leads(value)]
        constants = constant_arguments(function, node, shift)
        known = None
        if len(given) == len(led) and constants is not None:
            known = self._scan.analyst.given(function, given, constants)
        if known is not None and not known.runs_blocks():
            return known.returns
        if known is None or constants is None or not self._scan.calls.feeds(node, values, named):
            return self.opaque(node, values, named)
        first_only = shift == 0 and list(given) == [0]
        if first_only and self._scan.analyst.is_sequence(function, WHOLE_BLOCK, constants):
            element = self._driver.element(values[0])
            plain = self._scan.analyst.is_sequence(function, element, constants)
            return self._sequence(node, values[0], plain=plain)
        why = f"{function.__qualname__} is given a block and runs it"
        return self._notes.may_run(why, node, join(*led))

    def _sequence(self, node: ast.Call, first: Value, *, plain: bool) -> Value:
        """``checkpoint_seq(blocks, x)``: of the stack, of one block, or of what holds stacks."""
        element = self._driver.element(first)
        if first.blocks and not first.paths:
            return self._notes.run("through", node, first.blocks)
        if element.blocks and plain:
            return self._notes.run("sequence", node, element.blocks)
        if element.blocks:
            return self._notes.may_run(
                "the blocks are taken apart and run in sequence", node, first
            )
        return self._notes.run("whole", node, frozenset())

    def _around(self, node: ast.Call, first: Value) -> Value:
        """``checkpoint(function_around_block, x)``."""
        functions = [one for one in first.functions if self._labels_inside(one)]
        inside = [self._runs_in(one) for one in functions]
        labels = frozenset[str]().union(*(run.containers for runs in inside for run in runs))
        found = Value(blocks=labels)
        if len(functions) == 1 and len(inside[0]) == 1 and applies(self._target(node)):
            run = inside[0][0]
            name = block_name(functions[0], run.callee, node.args[0], self._names.makers)
            if name is not None and passes_on(functions[0], run.call):
                self._notes.findings.around[run.call] = run
                self.handed[functions[0]] = run.containers
                self._notes.findings.runs.pop(run.call, None)
                return self._notes.run("through", node, run.containers, name)
        why = "a function that runs a block in a way of its own is handed to another"
        self._notes.trouble(why, node, found, runs=True, inside=True)
        return NOTHING

    def opaque(self, node: ast.Call, values: list[Value], named: dict[str | None, Value]) -> Value:
        """A call that cannot be looked into."""
        holding = join(
            *[value for value in (*values, *named.values()) if self._contents.matters(value)]
        )
        if self._scan.calls.feeds(node, values, named):
            return self._notes.may_run(
                f"a block is given to {ast.unparse(node.func)}", node, holding
            )
        wrapped = self._driver.element(holding)
        return join(Value(part=holding.runnable), items_of(wrapped))

    def _runs_inside(self, value: Value) -> bool:
        return any(self._labels_inside(function) for function in value.functions)

    def _labels_inside(self, function: LocalFunction) -> frozenset[str]:
        own = [run.containers for run in self._runs_in(function)]
        returned = self._names.returns.get(function, NOTHING)
        nested = [self._labels_inside(one) for one in returned.functions if one is not function]
        return frozenset[str]().union(*own, *nested)

    def _runs_in(self, function: LocalFunction) -> list[Run]:
        inside = set(ast.walk(function))
        known = {**self._notes.findings.around, **self._notes.findings.runs}
        return [run for run in known.values() if run.call in inside]
