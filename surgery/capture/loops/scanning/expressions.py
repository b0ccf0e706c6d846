"""What expressions may stand for."""

from __future__ import annotations

import ast
import types

from surgery.capture.loops.scanning.part import Part
from surgery.capture.loops.scopes import stored
from surgery.capture.loops.values import NOTHING, Value, items_of, join, tuple_of

_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


class Expressions(Part):
    """Evaluates expressions."""

    def eval(self, node: ast.expr) -> Value:
        """What an expression may stand for."""
        match node:
            case ast.Name():
                scope = self._names.scope.holder(node.id)
                return NOTHING if scope is None else scope.values[node.id]
            case ast.Constant():
                return NOTHING
            case ast.Attribute():
                return self._attribute(node)
            case ast.Subscript():
                return self._subscript(node)
            case ast.Call():
                return self._scan.calls.call(node)
            case ast.IfExp():
                self.eval(node.test)
                return join(self.eval(node.body), self.eval(node.orelse))
            case ast.BoolOp():
                return join(*[self.eval(value) for value in node.values])
            case ast.BinOp():
                return self._operation(node)
            case ast.NamedExpr():
                value = self.eval(node.value)
                self._scan.statements.assign(node.target, value)
                return value
            case ast.Starred():
                return self.eval(node.value)
            case ast.Await():
                return self.eval(node.value)
            case _:
                return self._display_of(node)

    def _display_of(self, node: ast.expr) -> Value:
        match node:
            case ast.Tuple() | ast.List() | ast.Set():
                return self._display(node)
            case ast.Dict():
                for key in filter(None, node.keys):
                    self.eval(key)
                return items_of(join(*[self.eval(value) for value in node.values]))
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self._comprehension(node)
            case ast.Lambda():
                self._scan.statements.bind_defaults(node)
                self._names.scope_of(node)
                self._scan.statements.body_of(node)
                return Value(functions=frozenset({node}))
            case ast.Yield() | ast.YieldFrom():
                return self._yield(node)
            case _:
                self._scan.statements.other(node)
                return NOTHING

    def _yield(self, node: ast.Yield | ast.YieldFrom) -> Value:
        if node.value is None:
            return NOTHING
        value = self.eval(node.value)
        given = items_of(value) if isinstance(node, ast.Yield) else value
        self._names.give(self._names.within[-1], given)
        if self._contents.holds(value):
            self._notes.keep("a block is yielded", node, value)
        return NOTHING

    def _display(self, node: ast.Tuple | ast.List | ast.Set) -> Value:
        values = [self.eval(entry) for entry in node.elts]
        if any(isinstance(entry, ast.Starred) for entry in node.elts):
            entries = [
                self._driver.element(value) if isinstance(entry, ast.Starred) else value
                for entry, value in zip(node.elts, values, strict=True)
            ]
            return items_of(join(*entries))
        return tuple_of(*values)

    def _operation(self, node: ast.BinOp) -> Value:
        left, right = self.eval(node.left), self.eval(node.right)
        if not isinstance(node.op, ast.Add | ast.Mult):
            return NOTHING
        parts = [side for side in (left, right) if side.items or side.fields or side.paths]
        return items_of(join(*[self._driver.element(side) for side in parts]))

    def _comprehension(self, node: _COMPREHENSIONS) -> Value:
        outer = self._names.scope
        targets = [generator.target for generator in node.generators]
        scope = self._names.scope_of(node, [name for target in targets for name in stored(target)])
        loops = self._notes.loops
        for generator in node.generators:
            iterated = self.eval(generator.iter)
            self._names.scope = scope
            self._notes.loops = [*self._notes.loops, node]
            self._scan.statements.assign(generator.target, self._driver.element(iterated))
            for condition in generator.ifs:
                self.eval(condition)
        if isinstance(node, ast.DictComp):
            self.eval(node.key)
            value = self.eval(node.value)
        else:
            value = self.eval(node.elt)
        self._names.scope, self._notes.loops = outer, loops
        return items_of(value)

    def _attribute(self, node: ast.Attribute) -> Value:
        base = self.eval(node.value)
        found = self._driver.attribute(base, node.attr)
        owner = self._driver.method(node.attr) if "" in base.paths else None
        if isinstance(owner, property) and isinstance(owner.fget, types.FunctionType):
            return join(found, self._scan.calls.result_of(owner.fget))
        return found

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self.eval(node.value)
        self.eval(node.slice)
        element = self._driver.element(base)
        if isinstance(node.slice, ast.Slice):
            return items_of(element)
        index = node.slice.value if isinstance(node.slice, ast.Constant) else None
        plain = base.fields is not None and base.items is None and not base.paths
        if (
            plain
            and isinstance(index, int)
            and -len(base.fields or ()) <= index < len(base.fields or ())
        ):
            return (base.fields or ())[index]
        return element
