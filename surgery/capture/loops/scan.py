"""Where a function runs blocks, and where it does something with one that cannot be followed.

An abstract interpretation of the function's syntax tree, blind to the order of statements: a name
stands for whatever is assigned to it anywhere in its scope. Names of nested functions, lambdas and
comprehensions have scopes of their own; a nested function is followed through its calls.
"""

from __future__ import annotations

import ast
import functools
import itertools
import types
from collections.abc import Iterable, Sequence
from typing import Any

from surgery.capture.loops.callees import (
    CHAIN_FROM,
    GATHERING,
    INSPECTING,
    SEQUENCES,
    UNKNOWN,
    applies,
    constant_arguments,
    is_partial,
    name_pattern,
    python_function,
    resolve,
)
from surgery.capture.loops.closures import block_name, passes_on
from surgery.capture.loops.driver import WHOLE_BLOCK, Driver
from surgery.capture.loops.findings import Findings, Kind, Run, Trouble
from surgery.capture.loops.scopes import Scope, assigned, names_of, parameters, stored
from surgery.capture.loops.source import NoSource, Source, source_of
from surgery.capture.loops.values import (
    NOTHING,
    LocalFunction,
    Value,
    flatten,
    items_of,
    join,
    tuple_of,
    without_parts,
)

_ROUNDS = 12
_DEPTH = 4
_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


class Analyst:
    """Scans the functions of one driver; remembers what it found."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._known: dict[tuple[Any, ...], Findings | None] = {}
        self._methods: dict[types.CodeType, Findings] = {}
        self._depth = 0

    def method(self, function: types.FunctionType) -> Findings:
        """What a method does, ``self`` being the driver.

        Raises:
            NoSource: its text is not to be had.
        """
        if function.__code__ not in self._methods:
            arguments = {0: Value(paths=frozenset({""}))}
            scan = Scan(self, function, source_of(function), {})
            self._methods[function.__code__] = scan.run(arguments)
        return self._methods[function.__code__]

    def known(self) -> Iterable[Findings]:
        """What the methods scanned so far do."""
        return self._methods.values()

    def given(
        self,
        function: types.FunctionType,
        arguments: dict[int, Value],
        constants: dict[str, bool] | None = None,
    ) -> Findings | None:
        """What a function does with the blocks it is given; None if that cannot be told.

        Args:
            function: A Python function.
            arguments: What its parameters stand for, by position.
            constants: Parameters known to be true or false in this call.
        """
        known = tuple(sorted((constants or {}).items()))
        key = (function.__code__, tuple(sorted(arguments.items(), key=_position)), known)
        if key not in self._known:
            self._known[key] = None
            if self._depth < _DEPTH:
                self._known[key] = self._try(function, arguments, constants or {})
        return self._known[key]

    def is_sequence(
        self, function: types.FunctionType, items: Value, constants: dict[str, bool]
    ) -> bool:
        """Whether a function runs the items of its first argument one after the other."""
        found = self.given(function, {0: items_of(items)}, constants)
        if found is None or not found.runs_blocks():
            return False
        return all(trouble.inside for trouble in found.troubles.values() if trouble.runs)

    def _try(
        self, function: types.FunctionType, arguments: dict[int, Value], constants: dict[str, bool]
    ) -> Findings | None:
        self._depth += 1
        try:
            return Scan(self, function, source_of(function), constants).run(arguments)
        except NoSource:
            return None
        finally:
            self._depth -= 1


def _position(item: tuple[int, Value]) -> int:
    return item[0]


class Scan:
    """One function under analysis."""

    def __init__(
        self,
        analyst: Analyst,
        function: types.FunctionType,
        source: Source,
        constants: dict[str, bool],
    ) -> None:
        self.analyst = analyst
        self._constants = {
            name: value for name, value in constants.items() if name not in assigned(source.node)
        }
        self.driver = analyst.driver
        self.function = function
        self.source = source
        self.findings = Findings()
        self._scopes: dict[ast.AST, Scope] = {}
        self._returns: dict[ast.AST, Value] = {}
        self._scope = Scope((), None)
        self._within: list[ast.AST] = []
        self._loops: list[ast.AST] = []
        self._unused: set[ast.expr] = set()
        self._makers: dict[LocalFunction, LocalFunction] = {}
        self._entered: set[LocalFunction] = set()
        self._handed: dict[LocalFunction, frozenset[str]] = {}
        self._changed = False

    def run(self, arguments: dict[int, Value]) -> Findings:
        """Interpret the function until nothing new is learnt."""
        node = self.source.node
        names = parameters(node.args)
        self._scope = self._scope_of(node)
        for index, value in arguments.items():
            if index < len(names):
                self._learn(names[index], value)
        self._changed, rounds = True, 0
        while self._changed and rounds < _ROUNDS:
            self._changed, rounds = False, rounds + 1
            self.findings = Findings(aliases=self.findings.aliases)
            self._function_body(node)
        if self._changed:
            self._may_run("where blocks go is too entangled to be told", node, WHOLE_BLOCK)
        self.findings.returns = self._returns.get(node, NOTHING)
        self._check_entered()
        return self.findings

    def _check_entered(self) -> None:
        """A function around a block is either handed to another or called, not both."""
        why = "a function around a block is handed on and called as well"
        for function in self._entered & self._handed.keys():
            self._may_run(why, function, Value(blocks=self._handed[function]))

    # Scopes ----------------------------------------------------------------------------------

    def _scope_of(self, node: ast.AST, names: Iterable[str] | None = None) -> Scope:
        if node not in self._scopes:
            found = names_of(node) if names is None else names
            self._scopes[node] = Scope(found, self._scope)
        return self._scopes[node]

    def _learn(self, name: str, value: Value) -> None:
        scope = self._scope.holder(name)
        if value == NOTHING:
            return
        if scope is None:
            self._keep(f"a block is stored in the global {name}", self.source.node, value)
            return
        joined = join(scope.values[name], value)
        if joined != scope.values[name]:
            scope.values[name] = joined
            self._changed = True

    def _is_local(self, name: str) -> bool:
        return self._scope.holder(name) is not None

    def _function_body(self, node: LocalFunction | ast.FunctionDef) -> None:
        outer, loops = self._scope, self._loops
        self._scope, self._loops = self._scope_of(node), []
        if self._within and isinstance(self._within[-1], LocalFunction):
            self._makers[node] = self._within[-1]
        self._within.append(node)
        if isinstance(node, ast.Lambda):
            self._give(node, self._eval(node.body))
        else:
            self._block(node.body)
        self._within.pop()
        self._scope, self._loops = outer, loops

    def _give(self, node: ast.AST, value: Value) -> None:
        joined = join(self._returns.get(node, NOTHING), value)
        if joined != self._returns.get(node, NOTHING):
            self._returns[node] = joined
            self._changed = True

    # Statements ------------------------------------------------------------------------------

    def _block(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                self._assignment(node)
            case ast.Expr():
                self._unused.add(node.value)
                self._eval(node.value)
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
                self._other(node)

    def _match(self, node: ast.Match) -> None:
        value = self._eval(node.subject)
        captured = join(value, self.driver.element(value), items_of(self.driver.element(value)))
        for case in node.cases:
            for name in stored(case.pattern):
                self._learn(name, captured)
            self._other(case)

    def _assignment(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        if node.value is None:
            return
        value = self._eval(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            self._assign(target, value)

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            value = self._eval(item.context_expr)
            if item.optional_vars is not None:
                self._assign(item.optional_vars, value)
        self._block(node.body)

    def _if(self, node: ast.If) -> None:
        self._eval(node.test)
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

    def _other(self, node: ast.AST) -> None:
        """A statement without a meaning of its own for blocks: look into all of it."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child)
            elif isinstance(child, ast.expr):
                self._eval(child)
            else:
                self._other(child)

    def _return(self, node: ast.Return) -> None:
        if node.value is None:
            return
        value = self._eval(node.value)
        self._give(self._within[-1], value)
        if len(self._within) == 1 and self._holds(value) and not _is_module(value):
            self._keep("a block is returned", node, value)

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        if isinstance(node, ast.While):
            self._eval(node.test)
        else:
            self._assign(node.target, self.driver.element(self._eval(node.iter)))
        self._loops.append(node)
        self._block(node.body)
        self._loops.pop()
        self._block(node.orelse)

    def _define(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self._eval(default)
        if isinstance(node, ast.AsyncFunctionDef):
            self._other(node)
            return
        self._bind_defaults(node)
        if node.decorator_list:
            for decorator in node.decorator_list:
                self._eval(decorator)
        self._learn(node.name, Value(functions=frozenset({node})))
        self._function_body(node)

    def _bind_defaults(self, node: LocalFunction) -> None:
        """``lambda x, layer=layer: layer(x)``."""
        positional = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        named = [
            *zip(reversed(positional), reversed(node.args.defaults), strict=False),
            *zip((arg.arg for arg in node.args.kwonlyargs), node.args.kw_defaults, strict=True),
        ]
        for name, default in named:
            if default is not None:
                self._learn_in(node, name, self._eval(default))

    def _learn_in(self, node: LocalFunction, name: str, value: Value) -> None:
        outer, self._scope = self._scope, self._scope_of(node)
        if name in self._scope.values:
            self._learn(name, value)
        self._scope = outer

    def _assign(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name():
                self._learn(target.id, value)
            case ast.Tuple() | ast.List():
                self._unpack(target.elts, value)
            case ast.Starred():
                self._assign(target.value, items_of(self.driver.element(value)))
            case ast.Subscript():
                self._eval(target.slice)
                self._put_into(target.value, value, target)
            case ast.Attribute():
                self._set_attribute(target, value)
            case _:
                self._other(target)

    def _unpack(self, targets: Sequence[ast.expr], value: Value) -> None:
        fields = value.fields
        starred = any(isinstance(target, ast.Starred) for target in targets)
        if fields is not None and len(fields) == len(targets) and not starred:
            for target, entry in zip(targets, fields, strict=True):
                self._assign(target, entry)
            return
        element = self.driver.element(value)
        for target in targets:
            inner = items_of(element) if isinstance(target, ast.Starred) else element
            self._assign(target.value if isinstance(target, ast.Starred) else target, inner)

    def _put_into(self, holder: ast.expr, value: Value, node: ast.AST) -> None:
        """``holder[i] = value``, ``holder.append(value)``."""
        base = self._eval(holder)
        if isinstance(holder, ast.Name) and self._is_local(holder.id):
            self._learn(holder.id, items_of(value))
        elif self._holds(value) and not base.paths:
            self._keep("a block is stored in another object", node, value)

    def _set_attribute(self, target: ast.Attribute, value: Value) -> None:
        base = self._eval(target.value)
        if self.driver.attribute(base, target.attr).paths:
            self._keep("the stack is replaced", target, self.driver.attribute(base, target.attr))
        elif "" in base.paths and self._holds(value):
            known = self.findings.aliases.get(target.attr, NOTHING)
            self.findings.aliases[target.attr] = join(known, value)
        elif self._holds(value) and not (base.blocks or base.part):
            self._keep("a block is stored in another object", target, value)

    # Expressions -----------------------------------------------------------------------------

    def _eval(self, node: ast.expr) -> Value:
        match node:
            case ast.Name():
                scope = self._scope.holder(node.id)
                return NOTHING if scope is None else scope.values[node.id]
            case ast.Constant():
                return NOTHING
            case ast.Attribute():
                return self._attribute(node)
            case ast.Subscript():
                return self._subscript(node)
            case ast.Call():
                return self._call(node)
            case ast.IfExp():
                self._eval(node.test)
                return join(self._eval(node.body), self._eval(node.orelse))
            case ast.BoolOp():
                return join(*[self._eval(value) for value in node.values])
            case ast.BinOp():
                return self._operation(node)
            case ast.NamedExpr():
                value = self._eval(node.value)
                self._assign(node.target, value)
                return value
            case ast.Starred():
                return self._eval(node.value)
            case ast.Await():
                return self._eval(node.value)
            case _:
                return self._eval_display(node)

    def _eval_display(self, node: ast.expr) -> Value:
        match node:
            case ast.Tuple() | ast.List() | ast.Set():
                return self._display(node)
            case ast.Dict():
                keys = [self._eval(key) for key in node.keys if key is not None]
                del keys
                return items_of(join(*[self._eval(value) for value in node.values]))
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self._comprehension(node)
            case ast.Lambda():
                self._bind_defaults(node)
                self._scope_of(node)
                self._function_body(node)
                return Value(functions=frozenset({node}))
            case ast.Yield() | ast.YieldFrom():
                return self._yield(node)
            case _:
                self._other(node)
                return NOTHING

    def _yield(self, node: ast.Yield | ast.YieldFrom) -> Value:
        if node.value is None:
            return NOTHING
        value = self._eval(node.value)
        given = items_of(value) if isinstance(node, ast.Yield) else value
        self._give(self._within[-1], given)
        if self._holds(value):
            self._keep("a block is yielded", node, value)
        return NOTHING

    def _display(self, node: ast.Tuple | ast.List | ast.Set) -> Value:
        values = [self._eval(entry) for entry in node.elts]
        if any(isinstance(entry, ast.Starred) for entry in node.elts):
            entries = [
                self.driver.element(value) if isinstance(entry, ast.Starred) else value
                for entry, value in zip(node.elts, values, strict=True)
            ]
            return items_of(join(*entries))
        return tuple_of(*values)

    def _operation(self, node: ast.BinOp) -> Value:
        left, right = self._eval(node.left), self._eval(node.right)
        if not isinstance(node.op, ast.Add | ast.Mult):
            return NOTHING
        parts = [side for side in (left, right) if side.items or side.fields or side.paths]
        return items_of(join(*[self.driver.element(side) for side in parts]))

    def _comprehension(self, node: _COMPREHENSIONS) -> Value:
        outer = self._scope
        targets = [generator.target for generator in node.generators]
        scope = self._scope_of(node, [name for target in targets for name in stored(target)])
        loops = self._loops
        for generator in node.generators:
            iterated = self._eval(generator.iter)
            self._scope = scope
            self._loops = [*self._loops, node]
            self._assign(generator.target, self.driver.element(iterated))
            for condition in generator.ifs:
                self._eval(condition)
        if isinstance(node, ast.DictComp):
            self._eval(node.key)
            value = self._eval(node.value)
        else:
            value = self._eval(node.elt)
        self._scope, self._loops = outer, loops
        return items_of(value)

    def _attribute(self, node: ast.Attribute) -> Value:
        base = self._eval(node.value)
        found = self.driver.attribute(base, node.attr)
        owner = self.driver.method(node.attr) if "" in base.paths else None
        if isinstance(owner, property) and isinstance(owner.fget, types.FunctionType):
            return join(found, self._result_of(owner.fget))
        return found

    def _result_of(self, method: types.FunctionType) -> Value:
        function = python_function(method)
        if function is None or function.__code__ is self.source.code:
            return NOTHING
        if not self.driver.mentions(function.__code__):
            return NOTHING
        known = self.analyst.given(function, {0: Value(paths=frozenset({""}))})
        # What a helper makes of a block (an object it builds around one) is its own affair.
        return NOTHING if known is None else without_parts(known.returns)

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self._eval(node.value)
        self._eval(node.slice)
        element = self.driver.element(base)
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

    # Calls -----------------------------------------------------------------------------------

    def _call(self, node: ast.Call) -> Value:
        called = self._eval(node.func)
        values = [self._eval(argument) for argument in node.args]
        named = {keyword.arg: self._eval(keyword.value) for keyword in node.keywords}
        found: list[Value] = []
        if called.part and self._feeds(node, values, named):
            self._run_part(node, called)
        if called.runnable:
            self._run("call", node, called.runnable)
            self._no_blocks_in([*values, *named.values()], node)
            return NOTHING
        if called.functions:
            found += [self._enter(one, node, values, named) for one in called.functions]
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
        if items is not None and self._containers(items) and not _is_module(items):
            self._may_run("a part of the stack is called as a module", node, called)
        return join(*found, self._outside(node, called, values, named))

    def _method_call(
        self, node: ast.Call, callee: ast.Attribute, values: list[Value]
    ) -> Value | None:
        """Methods of containers, lists and dicts."""
        base = self._eval(callee.value)
        name = callee.attr
        if name in {"append", "add", "insert", "appendleft", "extend", "update", "setdefault"}:
            given = join(*values)
            inner = self.driver.element(given) if name in {"extend", "update"} else given
            if self._holds(given):
                self._put_into(callee.value, inner, node)
                return self.driver.element(base)
        if name in {"get_submodule", "__getattr__"} and base.paths and node.args:
            return self._get_attribute(base, node.args[0])
        if "" in base.paths and self.driver.method(name) is not None and not _is_view(name):
            return None
        return self.driver.method_result(base, name)

    def _get_attribute(self, base: Value, name: ast.expr) -> Value:
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            for part in name.value.split("."):
                base = (
                    self.driver.element(base)
                    if part.isdigit()
                    else self.driver.attribute(base, part)
                )
            return base
        return self.driver.named(base, name_pattern(name))

    def _own_call(
        self, name: str, node: ast.Call, values: list[Value], named: dict[str | None, Value]
    ) -> Value:
        """``self.name(...)``."""
        method = self.driver.method(name)
        function = python_function(method)
        if function is None:
            return self._outside(node, NOTHING, values, named)
        if not any(self._holds(value) for value in (*values, *named.values())):
            return self._result_of(function)
        bound = isinstance(method, types.FunctionType)
        return self._python_call(function, node, values, named, 1 if bound else 0)

    def _super_call(
        self, name: str, node: ast.Call, values: list[Value], named: dict[str | None, Value]
    ) -> Value:
        """``super().name(...)``: any of the ancestors' methods of that name."""
        if any(self._leads(value) for value in (*values, *named.values())):
            return self._opaque(node, values, named)
        defined = [vars(ancestor).get(name) for ancestor in self.driver.cls.__mro__]
        functions = [python_function(one) for one in defined if one is not None]
        return join(*[self._result_of(one) for one in functions if one is not None])

    def _enter(
        self,
        function: LocalFunction,
        node: ast.Call,
        values: list[Value],
        named: dict[str | None, Value],
    ) -> Value:
        """A call of a function defined inside the method."""
        self._entered.add(function)
        names = parameters(function.args)
        for name, value in zip(names, values, strict=False):
            self._learn_in(function, name, value)
        for name, value in named.items():
            if name is not None:
                self._learn_in(function, name, value)
        del node
        return self._returns.get(function, NOTHING)

    def _outside(
        self,
        node: ast.Call,
        called: Value,
        values: list[Value],
        named: dict[str | None, Value],
    ) -> Value:
        """A call of something defined elsewhere."""
        target = self._target(node)
        if target is getattr and len(node.args) >= 2:
            return join(self._get_attribute(values[0], node.args[1]), *values[2:])
        if target is not UNKNOWN:
            known = self._known(target, node, values)
            if known is not None:
                return known
        holding = [value for value in (*values, *named.values()) if self._matters(value)]
        if not holding:
            return NOTHING
        if is_partial(target):
            return self._partial(node, values, named)
        return self._unknown_call(target, node, called, values, named)

    def _target(self, node: ast.Call) -> Any:
        callee = node.func
        if isinstance(callee, ast.Attribute) and "" in self._eval(callee.value).paths:
            return self.driver.static(callee.attr)
        return resolve(callee, self.function, self._is_local)

    def _known(self, target: Any, node: ast.Call, values: list[Value]) -> Value | None:
        if target in INSPECTING:
            return NOTHING
        first = values[0] if values else NOTHING
        if target in GATHERING:
            return items_of(self.driver.element(first))
        if target is next:
            return join(self.driver.element(first), *values[1:])
        if target is enumerate:
            return items_of(tuple_of(NOTHING, self.driver.element(first)))
        if target is zip or target is itertools.zip_longest:
            return items_of(tuple_of(*[self.driver.element(value) for value in values]))
        if target is CHAIN_FROM:
            return items_of(self.driver.element(self.driver.element(first)))
        if target is itertools.chain:
            return items_of(join(*[self.driver.element(value) for value in values]))
        if target is dict:
            return items_of(join(*[self.driver.element(self.driver.element(v)) for v in values]))
        if target is map or target is filter:
            return self._map(target, values)
        if target is functools.reduce and len(values) > 1:
            for one in first.functions:
                names = parameters(one.args)
                self._learn_in(one, names[-1], self.driver.element(values[1]))
            return NOTHING if first.functions else None
        return None

    def _map(self, target: Any, values: list[Value]) -> Value:
        elements = [self.driver.element(value) for value in values[1:]]
        results: list[Value] = []
        for one in values[0].functions:
            for name, element in zip(parameters(one.args), elements, strict=False):
                self._learn_in(one, name, element)
            results.append(self._returns.get(one, NOTHING))
        return items_of(join(*elements) if target is filter else join(*results))

    def _partial(
        self, node: ast.Call, values: list[Value], named: dict[str | None, Value]
    ) -> Value:
        """``partial(block, ...)`` runs the block when it is called."""
        if values and values[0].runnable and not any(map(self._holds, values[1:])):
            self._no_blocks_in(named.values(), node)
            return Value(bound=values[0].runnable)
        holding = join(*values, *named.values())
        if values and not self._holds(values[0]) and not values[0].functions:
            return self._may_run("a block is bound to a function by partial", node, holding)
        return self._may_run("partial of a function around a block", node, holding)

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
        alone = not any(self._matters(value) for value in rest)
        starred = bool(node.args) and isinstance(node.args[0], ast.Starred)
        if alone and not starred:
            if first.runnable and applies(target) and self._feeds(node, values, named):
                return self._run("through", node, first.runnable)
            if first.functions and self._runs_inside(first):
                return self._around(node, first)
            if first.functions:
                return NOTHING
            if target in SEQUENCES:
                return self._sequence(node, first, plain=True)
            if _is_module(first) and applies(target):
                return NOTHING
        function = python_function(target)
        if function is not None:
            return self._python_call(function, node, values, named, 0)
        if isinstance(target, types.BuiltinFunctionType):
            return NOTHING  # written in C: it cannot run a module
        if isinstance(target, type):
            given = join(*[value for value in (*values, *named.values()) if self._matters(value)])
            return Value(part=self._containers(given))
        return self._opaque(node, values, named)

    def _python_call(
        self,
        function: types.FunctionType,
        node: ast.Call,
        values: list[Value],
        named: dict[str | None, Value],
        shift: int,
    ) -> Value:
        """A call of a function whose text can be read: does it run what it is given?"""
        names = list(function.__code__.co_varnames[: function.__code__.co_argcount])
        given = {i + shift: value for i, value in enumerate(values) if self._leads(value)}
        given |= {
            names.index(name): value
            for name, value in named.items()
            if name in names and self._leads(value)
        }
        led = [value for value in (*values, *named.values()) if self._leads(value)]
        constants = constant_arguments(function, node, shift)
        known = None
        if len(given) == len(led) and constants is not None:
            known = self.analyst.given(function, given, constants)
        if known is not None and not known.runs_blocks():
            return known.returns
        if known is None or constants is None or not self._feeds(node, values, named):
            return self._opaque(node, values, named)
        first_only = shift == 0 and list(given) == [0]
        if first_only and self.analyst.is_sequence(function, WHOLE_BLOCK, constants):
            element = self.driver.element(values[0])
            plain = self.analyst.is_sequence(function, element, constants)
            return self._sequence(node, values[0], plain=plain)
        why = f"{function.__qualname__} is given a block and runs it"
        return self._may_run(why, node, join(*led))

    def _sequence(self, node: ast.Call, first: Value, *, plain: bool) -> Value:
        """``checkpoint_seq(blocks, x)``: of the stack, of one block, or of what holds stacks."""
        element = self.driver.element(first)
        if first.blocks and not first.paths:
            return self._run("through", node, first.blocks)
        if element.blocks and plain:
            return self._run("sequence", node, element.blocks)
        if element.blocks:
            return self._may_run("the blocks are taken apart and run in sequence", node, first)
        return self._run("whole", node, frozenset())

    def _around(self, node: ast.Call, first: Value) -> Value:
        """``checkpoint(function_around_block, x)``."""
        functions = [one for one in first.functions if self._labels_inside(one)]
        inside = [self._runs_in(one) for one in functions]
        labels = frozenset[str]().union(*(run.containers for runs in inside for run in runs))
        found = Value(blocks=labels)
        if len(functions) == 1 and len(inside[0]) == 1 and applies(self._target(node)):
            run = inside[0][0]
            name = block_name(functions[0], run.callee, node.args[0], self._makers)
            if name is not None and passes_on(functions[0], run.call):
                self.findings.around[run.call] = run
                self._handed[functions[0]] = run.containers
                self.findings.runs.pop(run.call, None)
                return self._run("through", node, run.containers, name)
        why = "a function that runs a block in a way of its own is handed to another"
        self._trouble(why, node, found, runs=True, inside=True)
        return NOTHING

    def _opaque(self, node: ast.Call, values: list[Value], named: dict[str | None, Value]) -> Value:
        """A call that cannot be looked into."""
        holding = join(*[value for value in (*values, *named.values()) if self._matters(value)])
        if self._feeds(node, values, named):
            return self._may_run(f"a block is given to {ast.unparse(node.func)}", node, holding)
        wrapped = self.driver.element(holding)
        return join(Value(part=holding.runnable), items_of(wrapped))

    # Recording -------------------------------------------------------------------------------

    def _feeds(self, node: ast.Call, values: list[Value], named: dict[str | None, Value]) -> bool:
        """Whether a call passes something besides blocks and its result is used.

        A call that gives a block nothing to work on, or throws its result away, sets something
        up; it does not run the block on a state.
        """
        if node in self._unused:
            return False
        given = [
            *zip(node.args, values, strict=True),
            *((keyword.value, named[keyword.arg]) for keyword in node.keywords),
        ]
        return any(
            not isinstance(argument, ast.Constant) and not self._matters(value)
            for argument, value in given
        )

    def _run(
        self, kind: Kind, node: ast.Call, containers: frozenset[str], block: str | None = None
    ) -> Value:
        self.findings.runs[node] = Run(kind, node, containers, block)
        return NOTHING

    def _may_run(self, why: str, node: ast.AST, value: Value) -> Value:
        self._trouble(why, node, value, runs=True)
        return NOTHING

    def _run_part(self, node: ast.Call, value: Value) -> None:
        why = "a part of a block is run by itself"
        loop = self._loops[-1] if self._loops else None
        trouble = Trouble(why, node, loop, True, value.part, aside=loop is None)
        self.findings.troubles[node, why] = trouble

    def _keep(self, why: str, node: ast.AST, value: Value) -> None:
        self._trouble(why, node, value, runs=False)

    def _trouble(
        self, why: str, node: ast.AST, value: Value, *, runs: bool, inside: bool = False
    ) -> None:
        loop = self._loops[-1] if self._loops else None
        containers = self._containers(value)
        trouble = Trouble(why, node, loop, runs, containers, inside=inside)
        self.findings.troubles[node, why] = trouble

    def _no_blocks_in(self, values: Iterable[Value], node: ast.Call) -> None:
        for value in values:
            if self._holds(value) and not _is_module(value):
                self._may_run("a block is an argument of a block", node, value)

    # Questions -------------------------------------------------------------------------------

    def _containers(self, value: Value) -> frozenset[str]:
        known = frozenset(self.driver.members)
        found = [inner.runnable | (inner.paths & known) for inner in flatten(value)]
        return frozenset[str]().union(*found)

    def _holds(self, value: Value) -> bool:
        """Whether a block can be got out of a value."""
        return value != NOTHING and bool(self._containers(value))

    def _leads(self, value: Value) -> bool:
        """Whether a value holds a block, or a module in which there are some."""
        inner = [path for one in flatten(value) for path in one.paths]
        return self._holds(value) or any(path and self.driver.below(path) for path in inner)

    def _matters(self, value: Value) -> bool:
        return self._leads(value) or any(inner.functions for inner in flatten(value))

    def _runs_inside(self, value: Value) -> bool:
        return any(self._labels_inside(function) for function in value.functions)

    def _labels_inside(self, function: LocalFunction) -> frozenset[str]:
        own = [run.containers for run in self._runs_in(function)]
        returned = self._returns.get(function, NOTHING)
        nested = [self._labels_inside(one) for one in returned.functions if one is not function]
        return frozenset[str]().union(*own, *nested)

    def _runs_in(self, function: LocalFunction) -> list[Run]:
        inside = set(ast.walk(function))
        known = {**self.findings.around, **self.findings.runs}
        return [run for run in known.values() if run.call in inside]


def _is_view(name: str) -> bool:
    return name in {"children", "named_children", "values", "items", "__iter__", "pop", "keys"}


def _is_module(value: Value) -> bool:
    """A module that is no block: handing it on runs its own forward, which is rewritten itself."""
    return bool(value.paths) and not any(
        inner.runnable or inner.functions for inner in flatten(value)
    )


def _is_super(node: ast.expr) -> bool:
    callee = node.func if isinstance(node, ast.Call) else None
    return isinstance(callee, ast.Name) and callee.id == "super"
