"""What is read off a node of a captured graph: what it calls, its tensors, its operands."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx

from surgery.capture.structure import leaves
from surgery.capture.values import TensorSpec


def op_name(node: fx.Node) -> str:
    """The plain name of what a node calls: ``add`` for ``operator.add``, ``Tensor.add_``, ..."""
    if node.target is getattr:
        return str(node.args[1])
    return _plain_name(node.target)


@cache
def _plain_name(target: object) -> str:
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    return name.partition(".")[0].rstrip("_")


def spec(node: fx.Node) -> TensorSpec | None:
    """Shape and type of a node's tensor; None if it is a number or several tensors."""
    value = node.meta.get("val")
    return value if isinstance(value, TensorSpec) else None


def specs(node: fx.Node) -> list[TensorSpec]:
    """Shape and type of all tensors in a node's value."""
    return [leaf for leaf in leaves(node.meta.get("val")) if isinstance(leaf, TensorSpec)]


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes a node reads tensors from, in argument order, each as often as it is read."""
    read: list[Any] = leaves((node.args, node.kwargs))
    return [leaf for leaf in read if isinstance(leaf, fx.Node) and specs(leaf)]
