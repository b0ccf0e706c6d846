"""What statements do with blocks."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.capture.loops.scanning.contents import is_module
from surgery.capture.loops.scanning.part import Part
from surgery.capture.loops.scopes import stored
from surgery.capture.loops.values import NOTHING, LocalFunction, Value, items_of, join

if TYPE_CHECKING:
    from surgery.capture.loops.scanning.scan import Scan


class Statements(Part):
    """Goes through statements.

    Args:
        scan: What they are part of.
        constants: Names that are known to be true or false.
    """

    def __init__(self, scan: Scan, constants: Mapping[str, bool]) -> None:
        super().__init__(scan)
        self._constants = constants

    def body_of(self, node: LocalFunction) -> None:
        """Go through the body of a function."""
        with self._names.inside(node):
            if isinstance(node, ast.Lambda):
                self._names.give(node, self._scan.expressions.eval(node.body))
            else:
                self._block(node.body)

    def _block(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                self._assignment(node)
            case ast.Expr():
                self._scan.calls.unused.add(node.value)
                self._scan.expressions.eval(node.value)
            case ast.Return():
                self._return(node)
            case ast.For() | ast.AsyncFor() | ast.While():
                self._loop(node)
            case ast.If():
                self._if(node)
            case ast.With() | ast.AsyncWith():
                self._with(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._define(node)
            case ast.Match():
                self._match(node)
            case _:
                self.other(node)

    def _match(self, node: ast.Match) -> None:
        value = self._scan.expressions.eval(node.subject)
        captured = join(value, self._driver.element(value), items_of(self._driver.element(value)))
        for case in node.cases:
            for name in stored(case.pattern):
                self._names.learn(name, captured)
            self.other(case)

    def _assignment(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        if node.value is None:
            return
        value = self._scan.expressions.eval(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            self.assign(target, value)

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            value = self._scan.expressions.eval(item.context_expr)
            if item.optional_vars is not None:
                self.assign(item.optional_vars, value)
        self._block(node.body)

    def _if(self, node: ast.If) -> None:
        self._scan.expressions.eval(node.test)
        known = self._truth(node.test)
        if known is not False:
            self._block(node.body)
        if known is not True:
            self._block(node.orelse)

    def _truth(self, test: ast.expr) -> bool | None:
        """Whether a condition is known to hold in this call."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._truth(test.operand)
            return None if inner is None else not inner
        return self._constants.get(test.id) if isinstance(test, ast.Name) else None

    def other(self, node: ast.AST) -> None:
        """A statement without a meaning of its own for blocks: look into all of it."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child)
            elif isinstance(child, ast.expr):
                self._scan.expressions.eval(child)
            else:
                self.other(child)

    def _return(self, node: ast.Return) -> None:
        if node.value is None:
            return
        value = self._scan.expressions.eval(node.value)
        self._names.give(self._names.within[-1], value)
        if len(self._names.within) == 1 and self._contents.holds(value) and not is_module(value):
            self._notes.keep("a block is returned", node, value)

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        if isinstance(node, ast.While):
            self._scan.expressions.eval(node.test)
        else:
            self.assign(node.target, self._driver.element(self._scan.expressions.eval(node.iter)))
        self._notes.loops.append(node)
        self._block(node.body)
        self._notes.loops.pop()
        self._block(node.orelse)

    def _define(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self._scan.expressions.eval(default)
        if isinstance(node, ast.AsyncFunctionDef):
            self.other(node)
            return
        self.bind_defaults(node)
        if node.decorator_list:
            for decorator in node.decorator_list:
                self._scan.expressions.eval(decorator)
        self._names.learn(node.name, Value(functions=frozenset({node})))
        self.body_of(node)

    def bind_defaults(self, node: LocalFunction) -> None:
        """``lambda x, layer=layer: layer(x)``."""
        positional = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        named = [
            *zip(reversed(positional), reversed(node.args.defaults), strict=False),
            *zip((arg.arg for arg in node.args.kwonlyargs), node.args.kw_defaults, strict=True),
        ]
        for name, default in named:
            if default is not None:
                self._names.learn_in(node, name, self._scan.expressions.eval(default))

    def assign(self, target: ast.expr, value: Value) -> None:
        """``target = value``."""
        match target:
            case ast.Name():
                self._names.learn(target.id, value)
            case ast.Tuple() | ast.List():
                self._unpack(target.elts, value)
            case ast.Starred():
                self.assign(target.value, items_of(self._driver.element(value)))
            case ast.Subscript():
                self._scan.expressions.eval(target.slice)
                self.put_into(target.value, value, target)
            case ast.Attribute():
                self._set_attribute(target, value)
            case _:
                self.other(target)

    def _unpack(self, targets: Sequence[ast.expr], value: Value) -> None:
        fields = value.fields
        starred = any(isinstance(target, ast.Starred) for target in targets)
        if fields is not None and len(fields) == len(targets) and not starred:
            for target, entry in zip(targets, fields, strict=True):
                self.assign(target, entry)
            return
        element = self._driver.element(value)
        for target in targets:
            inner = items_of(element) if isinstance(target, ast.Starred) else element
            self.assign(target.value if isinstance(target, ast.Starred) else target, inner)

    def put_into(self, holder: ast.expr, value: Value, node: ast.AST) -> None:
        """``holder[i] = value``, ``holder.append(value)``."""
        base = self._scan.expressions.eval(holder)
        if isinstance(holder, ast.Name) and self._names.is_local(holder.id):
            self._names.learn(holder.id, items_of(value))
        elif self._contents.holds(value) and not base.paths:
            self._notes.keep("a block is stored in another object", node, value)

    def _set_attribute(self, target: ast.Attribute, value: Value) -> None:
        base = self._scan.expressions.eval(target.value)
        if self._driver.attribute(base, target.attr).paths:
            self._notes.keep(
                "the stack is replaced", target, self._driver.attribute(base, target.attr)
            )
        elif "" in base.paths and self._contents.holds(value):
            known = self._notes.findings.aliases.get(target.attr, NOTHING)
            self._notes.findings.aliases[target.attr] = join(known, value)
        elif self._contents.holds(value) and not (base.blocks or base.part):
            self._notes.keep("a block is stored in another object", target, value)
