"""What a forward reads, from its code: no module is run.

A host that adds a branch to a layer's output is wrong where somebody reads the layer's weight
and multiplies with it elsewhere (``F.linear(x, self.qkv.weight, bias)``), or where the class
computes with its weight in a way of its own. These questions find such readers.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from torch import nn

#: Looking at these of a weight does not compute with it.
_METADATA = frozenset({"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "layout"})
_METADATA_CALLS = frozenset({"size", "dim", "numel", "element_size", "is_floating_point", "stride"})


@cache
def reads(cls: type[nn.Module], name: str) -> bool:
    """Whether the forward of a class, or a method it uses, mentions the attribute ``name``."""
    return any(name in _names(function.__code__) for function in _forward_functions(cls))


@cache
def cooperates(cls: type[nn.Module], primitive: type[nn.Module], method: str = "forward") -> bool:
    """Whether ``method`` of ``cls`` ends in that of ``primitive`` with the weight untouched.

    True if every class above ``primitive`` leaves the method alone, or overrides it with one
    that calls ``super().method`` and does not compute with ``self.weight`` itself.
    """
    for parent in cls.__mro__[: cls.__mro__.index(primitive)]:
        found = parent.__dict__.get(method)
        if found is None:
            continue
        function = inspect.unwrap(found)
        if not isinstance(function, types.FunctionType):
            return False
        if not {"super", method} <= _names(function.__code__) or _uses_own(function, "weight"):
            return False
    return True


@cache
def reads_of_children(cls: type[nn.Module], parameter: str) -> frozenset[str]:
    """Dotted paths, relative to a module of this class, whose ``parameter`` its forward uses.

    Uses of metadata (``self.wo.weight.dtype``) do not count.
    """
    found: set[str] = set()
    for function in _forward_functions(cls):
        if parameter in _names(function.__code__):
            found.update(_chains(function, parameter))
    return frozenset(found)


def _forward_functions(cls: type[nn.Module]) -> list[types.FunctionType]:
    """The forward of a class and, transitively, the methods whose names it mentions."""
    pending = ["forward"]
    seen: set[str] = set()
    found: list[types.FunctionType] = []
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _definitions(cls, name):
            found.append(function)
            pending.extend(_names(function.__code__))
    return found


def _definitions(cls: type[nn.Module], name: str) -> Iterator[types.FunctionType]:
    """Every definition of a method among a class's ancestors below nn.Module."""
    for parent in cls.__mro__:
        if parent in (nn.Module, object):
            continue
        found = parent.__dict__.get(name)
        if isinstance(found, property):
            found = found.fget
        if isinstance(found, (staticmethod, classmethod)):
            found = cast("Any", found).__func__
        function = inspect.unwrap(found) if callable(found) else None
        if isinstance(function, types.FunctionType):
            yield function


def _names(code: types.CodeType) -> set[str]:
    """Every attribute and global name in a code object and those nested in it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _uses_own(function: types.FunctionType, parameter: str) -> bool:
    """Whether a function computes with ``self.<parameter>``."""
    if parameter not in _names(function.__code__):
        return False
    owners = _owners(function, parameter)
    return owners is None or "" in owners


def _chains(function: types.FunctionType, parameter: str) -> Iterator[str]:
    """The modules ``m`` in the uses of ``self.m.<parameter>`` in a function."""
    owners = _owners(function, parameter)
    # Without its source every attribute the function mentions may be such a module.
    yield from _names(function.__code__) if owners is None else owners - {""}


def _owners(function: types.FunctionType, parameter: str) -> set[str] | None:
    """Paths from ``self`` of the modules whose ``parameter`` is used, ``""`` for ``self``.

    None if the function has no source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:
        return None
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    aliases = _aliases(tree)
    owners = {
        _chain(node.value, aliases)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == parameter
        and isinstance(node.ctx, ast.Load)
        and not _is_metadata(node, parents)
    }
    return {owner for owner in owners if owner is not None}


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local name → path of the module it was assigned, as in ``layer = self.qkv``."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            chain = _chain(node.value, {})
            if chain:
                aliases[node.targets[0].id] = chain
    return aliases


def _chain(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """``a.0.b`` for ``self.a[0].b``, ``""`` for ``self``; None if it starts elsewhere."""
    parts: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            parts.append(str(node.slice.value))
        else:
            return None
        node = node.value
    if node.id in aliases:
        parts.append(aliases[node.id])
    elif node.id != "self":
        return None
    return ".".join(reversed(parts))


def _is_metadata(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr in _METADATA | _METADATA_CALLS
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in {"isinstance", "type", "id"}
    return isinstance(parent, ast.Compare) and all(
        isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops
    )
