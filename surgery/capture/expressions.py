"""Nodes and values as Python expressions."""

from __future__ import annotations

import builtins
import keyword
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.capture import private
from surgery.capture.signs import PREFIXES, SIGNS

MODULES: dict[str, Any] = {
    "torch": torch,
    "F": nn.functional,
    "math": math,
    "operator": operator,
}


class Expressions:
    """Writes expressions, and keeps the globals they need.

    Args:
        root: ``self`` of the forward.
        constants: Tensors by their ``get_attr`` target.
        inline: Nodes to write where they are used.
        reserved: Names a global must not take.
    """

    def __init__(
        self,
        root: nn.Module,
        constants: Mapping[str, Any],
        inline: set[fx.Node],
        reserved: frozenset[str],
    ) -> None:
        self.names: dict[str, Any] = {}
        self._root = root
        self._constants = constants
        self._inline = inline
        self._reserved = reserved | {"self", *MODULES}

    def variable(self, node: fx.Node) -> str:
        """The variable that holds a node's value."""
        return f"{node.name}_" if node.name in self._reserved else node.name

    def write(self, value: Any) -> str:
        """A node or a plain value."""
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.write, _bounds(cast(Any, value))))})"
        if isinstance(value, tuple):
            return self._tuple(cast("tuple[Any, ...]", value))
        if isinstance(value, list):
            return f"[{', '.join(map(self.write, cast('list[Any]', value)))}]"
        if isinstance(value, dict):
            items = cast("dict[Any, Any]", value).items()
            return f"{{{', '.join(f'{key!r}: {self.write(item)}' for key, item in items)}}}"
        return self.literal(value)

    def operand(self, value: Any) -> str:
        """The same, in brackets where an operator beside it would tear it apart."""
        text = self.write(value)
        if isinstance(value, fx.Node):
            infix = value.target in SIGNS or value.target in PREFIXES
            return f"({text})" if value in self._inline and infix else text
        return f"({text})" if text.startswith("-") else text

    def call(self, node: fx.Node) -> str:
        """What a node does."""
        if node.op == "call_module":
            path = self.path(cast(str, node.target))
            return f"{path}({self._arguments(node.args, node.kwargs)})"
        if node.op == "call_method":
            return self._method(node)
        return self._function_call(node)

    def literal(self, value: Any) -> str:
        """A value that is no node: spelled out, or a global where it cannot be."""
        if value is Ellipsis:
            return "..."
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or type(value) in _SPELLED:
            return repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        return self.name(value)

    def name(self, value: Any) -> str:
        """A name for a class, a function or another object."""
        stem = getattr(value, "__name__", type(value).__name__)
        if not stem.isidentifier() or keyword.iskeyword(stem):
            stem = "value"
        if getattr(builtins, stem, None) is value:
            return stem
        stem = stem if stem[0].isupper() else f"_{stem}"
        name, count = stem, 1
        while name in self._reserved or self.names.get(name, value) is not value:
            name, count = f"{stem}_{count}", count + 1
        self.names[name] = value
        return name

    def path(self, target: str) -> str:
        """How to get from ``self`` to a child: ``self.blocks[0].attn``."""
        text, module = "self", self._root
        for part in target.split(".") if target else ():
            text += _step(module, part)
            module = cast(nn.Module, getattr(module, part, module))
        return text

    def index(self, index: Any) -> str:
        """What stands between square brackets."""
        if isinstance(index, slice):
            bounds = _bounds(cast(Any, index))
            start, stop, step = ("" if item is None else self.write(item) for item in bounds)
            return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
        if type(index) is tuple and index:
            items = cast("tuple[Any, ...]", index)
            return ", ".join(map(self.index, items)) + ("," if len(items) == 1 else "")
        return self.write(index)

    def _node(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self._attribute(cast(str, node.target))
        return self.call(node) if node in self._inline else self.variable(node)

    def _attribute(self, target: str) -> str:
        if target in self._constants:
            self.names[target] = self._constants[target]
            return target
        return self.path(target)

    def _tuple(self, value: tuple[Any, ...]) -> str:
        kind = type(value)
        inner = ", ".join(map(self.write, value))
        one = f"({inner},)" if len(value) == 1 else f"({inner})"
        if kind in (tuple, torch.Size):
            return one
        named = getattr(kind, "_fields", None) is not None
        return f"{self.name(kind)}({inner})" if named else f"{self.name(kind)}({one})"

    def _function_call(self, node: fx.Node) -> str:
        target, args = cast("Callable[..., Any]", node.target), node.args
        if not node.kwargs:
            if target is getattr and str(args[1]).isidentifier():
                return f"{self.operand(args[0])}.{args[1]}"
            if target is operator.getitem:
                return f"{self.operand(args[0])}[{self.index(args[1])}]"
            if target in SIGNS and len(args) == 2:
                return f"{self.operand(args[0])} {SIGNS[target]} {self.operand(args[1])}"
            if target in PREFIXES:
                return f"{PREFIXES[target]}{self.operand(args[0])}"
        return f"{self._function(target)}({self._arguments(args, node.kwargs)})"

    def _function(self, target: Callable[..., Any]) -> str:
        name = getattr(target, "__name__", "")
        for prefix, module in MODULES.items():
            if getattr(module, name, None) is target:
                return f"{prefix}.{name}"
        return f"torch.ops.{target}" if private.is_operator(target) else self.name(target)

    def _method(self, node: fx.Node) -> str:
        name = cast(str, node.target)
        receiver, rest = self.operand(node.args[0]), node.args[1:]
        if name == "__getitem__":
            return f"{receiver}[{self.index(rest[0])}]"
        if name == "__len__":
            return f"len({receiver})"
        if name == "__contains__":
            return f"{self.operand(rest[0])} in {receiver}"
        callee = receiver if name == "__call__" else f"{receiver}.{name}"
        return f"{callee}({self._arguments(rest, node.kwargs)})"

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        keywords = (f"{name}={self.write(value)}" for name, value in kwargs.items())
        return ", ".join([*map(self.write, args), *keywords])


_SPELLED = frozenset({bool, int, float, complex, str, bytes, range})


def _step(module: nn.Module, part: str) -> str:
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and part.isdigit():
        return f"[{part}]"
    if isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
        return f"[{part!r}]"
    if isinstance(module, nn.ParameterList):
        return f"[{part}]"
    return f".{part}" if part.isidentifier() else f"._modules[{part!r}]"


def _bounds(value: Any) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step
