"""A captured graph as readable Python.

One statement per tensor operation, in the order of the original; sizes and attributes of the
module are written where they are used; a variable is deleted after its last use, so that memory
is freed as early as the original frees it. Statements that ran under ``torch.no_grad`` or autocast
are put into ``with`` blocks again.
"""

from __future__ import annotations

import builtins
import dataclasses
import keyword
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from surgery.capture import signature as sig
from surgery.capture.guards import Guard, assign, expect
from surgery.capture.structure import leaves
from surgery.capture.values import PREFIXES, SIGNS, TensorSpec

_INDENT = "    "
_GLOBALS: dict[str, Any] = {"torch": torch, "F": F, "math": math, "operator": operator}
_RESERVED = frozenset({"self", "Tensor", "Miss", *_GLOBALS})
_BUILTINS = frozenset(
    {bool, int, float, len, list, tuple, max, min, round, abs, getattr, setattr, isinstance}
)


@dataclasses.dataclass(frozen=True)
class Condition:
    """One thing that holds at a call the graph is right for.

    Attributes:
        text: Python over the parameters of the forward.
        why: What to tell the user when it does not hold.
    """

    text: str
    why: str


@dataclasses.dataclass(frozen=True)
class Code:
    """Generated source.

    Attributes:
        source: The text of ``accepts`` and ``forward``.
        names: The globals it refers to, besides builtins.
        conditions: What ``accepts`` checks, one by one.
        inline: The guards checked on the way, in the order of their numbers in the text.
    """

    source: str
    names: dict[str, Any]
    conditions: tuple[Condition, ...]
    inline: tuple[Guard, ...]


class Miss(Exception):  # noqa: N818  control flow between generated code and its caller
    """A guard inside a generated forward did not hold."""

    def __init__(self, index: int, values: Mapping[str, Any]) -> None:
        super().__init__(index)
        self.index = index
        self.values = values


def generate(
    graph: fx.Graph,
    root: nn.Module,
    signature: sig.Signature,
    constants: Mapping[str, Any],
) -> Code:
    """Write the Python of a captured graph.

    Args:
        graph: A graph of a replayable trace.
        root: The module it was captured from: says how to spell the path to a child.
        signature: The calls it is right for.
        constants: Tensors that belong to no module, by their ``get_attr`` target.
    """
    return _Writer(graph, root, signature, constants).write()


class _Writer:
    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        signature: sig.Signature,
        constants: Mapping[str, Any],
    ) -> None:
        self._nodes = list(graph.nodes)
        self._root = root
        self._signature = signature
        self._constants = constants
        self._names: dict[str, Any] = {"Tensor": torch.Tensor, "Miss": Miss}
        self._inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._upfront = _upfront(self._nodes)
        self._inline = _inlined(self._nodes)
        self._used = _used(self._nodes, self._upfront)
        self._guards: list[Guard] = []

    def write(self) -> Code:
        body = list(self._body())
        conditions = list(self._conditions())
        parameters = ", ".join(["self", *(self._variable(node) for node in self._inputs)])
        checks = f"\n{_INDENT * 2}and ".join(condition.text for condition in conditions) or "True"
        source = (
            f"def accepts({parameters}):\n{_INDENT}return (\n{_INDENT * 2}{checks}\n{_INDENT})\n"
            f"\n\ndef forward({parameters}):\n" + "\n".join(_INDENT + line for line in body) + "\n"
        )
        used = {name: value for name, value in _GLOBALS.items() if f"{name}." in source}
        return Code(source, {**used, **self._names}, tuple(conditions), tuple(self._guards))

    # -- the conditions of a call --------------------------------------------------------------

    def _conditions(self) -> Iterator[Condition]:
        for parameter, node in zip(self._signature.parameters, self._inputs, strict=True):
            spec = self._signature.specs[parameter.name]
            yield from self._spec_conditions(self._variable(node), spec)
        for state in self._signature.autocast:
            text = f"torch.is_autocast_enabled({state.device_type!r}) is {state.enabled}"
            yield Condition(text, f"autocast on {state.device_type} is {_on(state.enabled)}")
            if state.enabled:
                text = f"torch.get_autocast_dtype({state.device_type!r}) == {state.dtype}"
                yield Condition(text, f"autocast on {state.device_type} uses {state.dtype}")
        seen: set[str] = set()
        for node in self._nodes:
            if node.target is expect and node in self._upfront:
                text = self._holds(node)
                if text not in seen:
                    seen.add(text)
                    yield Condition(text, str(node.meta["guard"]))

    def _spec_conditions(self, name: str, spec: sig.Spec) -> Iterator[Condition]:
        why = f"{name} is {spec}"
        if isinstance(spec, sig.Tensor):
            yield Condition(f"isinstance({name}, Tensor) and {name}.ndim == {spec.rank}", why)
        elif isinstance(spec, sig.Number):
            yield Condition(f"type({name}) is {spec.kind.__name__}", why)
        elif isinstance(spec, sig.Static):
            same = "is" if spec.value is None or isinstance(spec.value, bool) else "=="
            yield Condition(f"{name} {same} {self._literal(spec.value)}", why)
        elif isinstance(spec, sig.Instance):
            yield Condition(f"type({name}) is {self._global(spec.kind)}", why)
        elif isinstance(spec, sig.Items):
            kind = self._global(spec.kind)
            yield Condition(f"type({name}) is {kind} and len({name}) == {len(spec.items)}", why)
            for index, item in enumerate(spec.items):
                yield from self._spec_conditions(f"{name}[{index}]", item)
        else:
            keys = [key for key, _ in spec.items]
            text = f"{name}.keys() == {{{', '.join(map(repr, keys))}}}" if keys else f"not {name}"
            yield Condition(text, why)
            for key, item in spec.items:
                yield from self._spec_conditions(f"{name}[{key!r}]", item)

    def _holds(self, node: fx.Node) -> str:
        value, expected = node.args
        text = self._operand(value)
        if expected is True:
            return text
        if expected is False:
            return f"not {text}"
        if expected is None:
            return f"{text} is None"
        return f"{text} == {self._literal(expected)}"

    def _fails(self, node: fx.Node) -> str:
        value, expected = node.args
        text = self._operand(value)
        if expected is True:
            return f"not {text}"
        if expected is False:
            return self._expression(value)
        if expected is None:
            return f"{text} is not None"
        return f"{text} != {self._literal(expected)}"

    # -- statements ----------------------------------------------------------------------------

    def _body(self) -> Iterator[str]:
        context: tuple[Any, ...] = ()
        for node in self._nodes:
            line = self._statement(node)
            if line is None:
                continue
            now = cast(tuple[Any, ...], node.meta.get("context", ()))
            if now != context and now:
                yield f"with {', '.join(map(str, now))}:"
            context = now
            indent = _INDENT if now else ""
            yield indent + line
            dead = self._dead_after(node)
            if dead:
                yield f"{indent}del {', '.join(dead)}"

    def _statement(self, node: fx.Node) -> str | None:
        if node.op == "output":
            return f"return {self._expression(node.args[0])}"
        if node.op == "placeholder" or node in self._inline or node not in self._used:
            return None
        if node.target is expect:
            return self._guard(node)
        if node.target is assign:
            path, value = node.args
            return f"{self._path(cast(str, path))} = {self._expression(value)}"
        written = self._write_statement(node)
        if written is not None:
            return written
        call = self._call(node)
        return f"{self._variable(node)} = {call}" if node.users else call

    def _write_statement(self, node: fx.Node) -> str | None:
        if node.target is operator.setitem or node.target == "__setitem__":
            target, index, value = node.args
            return f"{self._operand(target)}[{self._index(index)}] = {self._expression(value)}"
        if node.target is setattr:
            target, name, value = node.args
            return f"{self._operand(target)}.{name} = {self._expression(value)}"
        return None

    def _guard(self, node: fx.Node) -> str | None:
        if node in self._upfront:
            return None
        guard = cast(Guard, node.meta["guard"])
        index = len(self._guards)
        self._guards.append(guard)
        where = f"{PurePath(guard.file).name}:{guard.line}"
        return f"if {self._fails(node)}: raise Miss({index}, locals())  # {where}"

    def _dead_after(self, node: fx.Node) -> list[str]:
        return [self._variable(dead) for dead in self._last_uses.get(node, ())]

    @property
    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        if self._last is None:
            self._last = self._find_last_uses()
        return self._last

    _last: dict[fx.Node, list[fx.Node]] | None = None

    def _find_last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """Statement → the variables that no later statement needs."""
        last: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self._nodes):
            if node in self._inline or node not in self._used or node in self._upfront:
                continue
            for variable in self._variables_in(node):
                if variable not in seen:
                    seen.add(variable)
                    if node.op != "output":
                        last.setdefault(node, []).append(variable)
        return last

    def _variables_in(self, node: fx.Node) -> Iterator[fx.Node]:
        for argument in node.all_input_nodes:
            if argument in self._inline:
                yield from self._variables_in(argument)
            elif argument.op != "placeholder":
                yield argument

    # -- expressions ---------------------------------------------------------------------------

    def _variable(self, node: fx.Node) -> str:
        return f"{node.name}_" if node.name in _RESERVED else node.name

    def _expression(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self._attribute(cast(str, value.target))
            return self._call(value) if value in self._inline else self._variable(value)
        if isinstance(value, slice):
            return f"slice({', '.join(map(self._expression, _bounds(value)))})"
        if isinstance(value, tuple):
            return self._tuple(cast(tuple[Any, ...], value))
        if isinstance(value, list):
            return f"[{', '.join(map(self._expression, cast(list[Any], value)))}]"
        if isinstance(value, dict):
            items = cast(dict[Any, Any], value).items()
            return f"{{{', '.join(f'{key!r}: {self._expression(item)}' for key, item in items)}}}"
        return self._literal(value)

    def _tuple(self, value: tuple[Any, ...]) -> str:
        kind = cast(type, type(value))
        inner = ", ".join(map(self._expression, value))
        if kind in (tuple, torch.Size):
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if getattr(kind, "_fields", None) is not None:
            return f"{self._global(kind)}({inner})"
        return f"{self._global(kind)}(({inner},))"

    def _operand(self, value: Any) -> str:
        """An expression that binds tighter than any operator around it."""
        text = self._expression(value)
        if isinstance(value, fx.Node):
            infix = value in self._inline and (value.target in SIGNS or value.target in PREFIXES)
            return f"({text})" if infix else text
        if isinstance(value, (int, float, complex)) and not isinstance(value, bool):
            return f"({text})" if value < 0 else text  # pyright: ignore[reportOperatorIssue]
        return text

    def _call(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return (
                f"{self._path(cast(str, node.target))}({self._arguments(node.args, node.kwargs)})"
            )
        if node.op == "call_method":
            return self._method(node)
        target = cast(Callable[..., Any], node.target)
        plain = not node.kwargs
        if target is getattr and plain and str(node.args[1]).isidentifier():
            return f"{self._operand(node.args[0])}.{node.args[1]}"
        if target is operator.getitem and plain:
            return f"{self._operand(node.args[0])}[{self._index(node.args[1])}]"
        if target in SIGNS and len(node.args) == 2 and plain:
            left, right = map(self._operand, node.args)
            return f"{left} {SIGNS[target]} {right}"
        if target in PREFIXES and plain:
            return f"{PREFIXES[target]}{self._operand(node.args[0])}"
        return f"{self._function(target)}({self._arguments(node.args, node.kwargs)})"

    def _method(self, node: fx.Node) -> str:
        name = cast(str, node.target)
        receiver = self._operand(node.args[0])
        rest = node.args[1:]
        if name == "__getitem__":
            return f"{receiver}[{self._index(rest[0])}]"
        if name == "__len__":
            return f"len({receiver})"
        if name == "__contains__":
            return f"{self._operand(rest[0])} in {receiver}"
        arguments = self._arguments(rest, node.kwargs)
        return (
            f"{receiver}({arguments})" if name == "__call__" else f"{receiver}.{name}({arguments})"
        )

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        keywords = [f"{name}={self._expression(value)}" for name, value in kwargs.items()]
        return ", ".join([*map(self._expression, args), *keywords])

    def _index(self, index: Any) -> str:
        if isinstance(index, slice):
            start, stop, step = (
                "" if bound is None else self._expression(bound) for bound in _bounds(index)
            )
            return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
        if type(index) is tuple and index:
            items = cast(tuple[Any, ...], index)
            return ", ".join(map(self._index, items)) + ("," if len(items) == 1 else "")
        return self._expression(index)

    def _literal(self, value: Any) -> str:
        if value is Ellipsis:
            return "..."
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or type(value) in (bool, int, float, complex, str, bytes, range):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        return self._global(value)

    def _function(self, target: Callable[..., Any]) -> str:
        name = getattr(target, "__name__", "")
        for prefix, module in (("torch", torch), ("F", F), ("math", math), ("operator", operator)):
            if getattr(module, name, None) is target:
                return f"{prefix}.{name}"
        if target in _BUILTINS:
            return name
        return self._global(target)

    def _global(self, value: Any) -> str:
        """A name for a class, a function or another object the code refers to."""
        stem = getattr(value, "__name__", type(value).__name__)
        stem = stem if stem.isidentifier() and not keyword.iskeyword(stem) else "value"
        if getattr(builtins, stem, None) is value:
            return stem
        stem = stem if stem[0].isupper() else f"_{stem}"
        name, count = stem, 1
        while name in _RESERVED or self._names.get(name, value) is not value:
            name, count = f"{stem}_{count}", count + 1
        self._names[name] = value
        return name

    def _attribute(self, target: str) -> str:
        if target in self._constants:
            self._names[target] = self._constants[target]
            return target
        owner, _, name = target.rpartition(".")
        return f"{self._path(owner)}.{name}" if owner else f"self.{name}"

    def _path(self, target: str) -> str:
        """How to get from ``self`` to a child: ``self.blocks[0].attn``."""
        text, module = "self", self._root
        for part in target.split("."):
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and part.isdigit():
                text += f"[{part}]"
            elif isinstance(module, nn.ModuleDict):
                text += f"[{part!r}]"
            else:
                text += f".{part}" if part.isidentifier() else f"._modules[{part!r}]"
            module = cast(nn.Module, getattr(module, part, module))
        return text


def _upfront(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose value follows from the arguments before anything has run."""
    known: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or _is_number_attribute(node):
            known.add(node)
        elif node.op == "call_function" and all(arg in known for arg in node.all_input_nodes):
            if node.target is expect or _is_light(node):
                known.add(node)
    return known


def _inlined(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes written where they are used rather than as a statement of their own."""
    inline: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr":
            inline.add(node)
        elif node.op == "call_function" and _is_light(node):
            reads_tensor = (
                node.target is getattr and cast(fx.Node, node.args[0]).op != "placeholder"
            )
            base = node.args[0] if node.args else None
            if not reads_tensor or base in inline:
                inline.add(node)
    return inline


def _is_light(node: fx.Node) -> bool:
    """True for what costs nothing and reads nothing that changes: sizes, items of a tuple."""
    if node.target in (expect, assign, setattr, list) or node.meta.get("mutates"):
        return False
    if node.target is getattr:
        return _is_fact(node)
    if node.target is operator.getitem:
        base = cast(fx.Node, node.args[0])
        return not isinstance(base.meta.get("val"), TensorSpec)
    if node.target in (bool, int, float):
        return not _holds_tensor(node.args[0])
    return not any(_holds_tensor(value) for value in (node, *node.all_input_nodes)) and (
        node.target in SIGNS or node.target in PREFIXES or node.target in _NUMERIC
    )


_NUMERIC = frozenset({len, max, min, round, abs, operator.abs, math.floor, math.ceil, math.trunc,
                      math.sqrt})  # fmt: skip


def _is_fact(node: fx.Node) -> bool:
    """True for an attribute of a tensor that is no tensor, or of such an attribute."""
    base = node.args[0]
    if not isinstance(base, fx.Node) or _holds_tensor(node):
        return False
    return _holds_tensor(base) or (base.target is getattr and _is_fact(base))


def _is_number_attribute(node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(node.meta.get("val"), (int, float))


def _holds_tensor(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    return any(isinstance(leaf, TensorSpec) for leaf in leaves(value.meta.get("val")))


def _used(nodes: list[fx.Node], upfront: set[fx.Node]) -> set[fx.Node]:
    """Nodes with an effect, and what those need."""
    used: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "placeholder" or node in used:
            used.add(node)
        elif node.target is expect:
            if node in upfront:
                continue
            used.add(node)
        elif _is_light(node) or node.op == "get_attr":
            continue
        else:
            used.add(node)
        used.update(node.all_input_nodes)
    return used


def _bounds(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


def _on(enabled: bool) -> str:
    return "on" if enabled else "off"
