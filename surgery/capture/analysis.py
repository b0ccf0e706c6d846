"""What may be written where in the Python of a captured graph."""

from __future__ import annotations

import math
import operator
from typing import Any, cast

from torch import fx

from surgery.capture.guards import assign, expect
from surgery.capture.nodes import specs
from surgery.capture.signs import PREFIXES, SIGNS
from surgery.capture.values import TensorSpec


def upfront(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose value follows from the arguments and the module before anything has run."""
    known: set[fx.Node] = set()
    for node in nodes:
        given = node.op in ("placeholder", "get_attr")
        derived = node.op == "call_function" and all(arg in known for arg in node.all_input_nodes)
        if given or (derived and (node.target is expect or is_light(node))):
            known.add(node)
    return known


def inlined(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes written where they are used: attributes of ``self``, sizes, items of a tuple.

    The shape of an intermediate tensor is a statement of its own, so that the tensor itself can
    be freed.
    """
    inline: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr":
            inline.add(node)
        elif node.op == "call_function" and is_light(node):
            base = node.args[0] if node.args else None
            of_tensor = node.target is getattr and isinstance(base, fx.Node)
            if not of_tensor or base in inline or cast(fx.Node, base).op == "placeholder":
                inline.add(node)
    return inline


def used(nodes: list[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
    """Nodes with an effect and those they need; guards that are checked up front left out."""
    needed: set[fx.Node] = set()
    for node in reversed(nodes):
        idle = is_light(node) or node.op == "get_attr" or (node.target is expect and node in known)
        if node in needed or not idle:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return needed


def is_light(node: fx.Node) -> bool:
    """True for what costs nothing and reads nothing that changes."""
    if node.op != "call_function" or node.target in _HEAVY or node.meta.get("mutates"):
        return False
    if node.target is getattr:
        return is_fact(node)
    if node.target is operator.getitem:
        base = cast(fx.Node, node.args[0])
        return not isinstance(base.meta.get("val"), TensorSpec)
    if any(holds_tensor(value) for value in (node, *node.all_input_nodes)):
        return node.target is len
    return node.target in SIGNS or node.target in PREFIXES or node.target in _NUMERIC


_HEAVY = frozenset({expect, assign, setattr, list})
_NUMERIC = frozenset(
    {bool, int, float, len, max, min, round, operator.abs, math.floor, math.ceil, math.trunc}
)


def is_fact(node: fx.Node) -> bool:
    """True for an attribute of a tensor that is no tensor, or for one of such an attribute."""
    base = node.args[0]
    if not isinstance(base, fx.Node) or holds_tensor(node):
        return False
    return holds_tensor(base) or (base.target is getattr and is_fact(base))


def holds_tensor(value: Any) -> bool:
    """True for a node with a tensor in its value."""
    return isinstance(value, fx.Node) and bool(specs(value))
