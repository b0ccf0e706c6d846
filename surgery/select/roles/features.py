"""Which output features of a layer arrive where, found by sending their indices through.

A tensor that holds, at every element, the index of the feature that the element came from, is put
in place of a layer's output and taken through the same views, splits and concatenations that the
model applies. Interleaved heads, grouped queries and windows need no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx

from surgery.capture.nodes import op_name, operands
from surgery.select.roles.ops import Kind, argument, op_kind, shape
from surgery.select.roles.role import Features

_NONE = -1.0
_NOT_RUN = frozenset(
    [
        "dropout",
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "cpu",
        "cuda",
        "clone",
        "detach",
        "masked_fill",
        "clamp",
        "clip",
        "real",
        "data",
    ]
)


class Indices:
    """Indices along one axis of a node's tensor, as they arrive at later nodes.

    Args:
        source: The node.
        axis: The axis that is counted.
        order: Position of every node in its graph.
        opaque: Whether a node mixes features, so that nothing is followed through it.
    """

    def __init__(
        self,
        source: fx.Node,
        axis: int,
        order: Callable[[fx.Node], int],
        opaque: Callable[[fx.Node], bool],
    ) -> None:
        sizes = shape(source)
        counted = torch.arange(sizes[axis], dtype=torch.float64)
        along = [1] * len(sizes)
        along[axis] = sizes[axis]
        self._order = order
        self._opaque = opaque
        self._first = order(source)
        self._known: dict[fx.Node, Any] = {source: counted.reshape(along).expand(sizes)}

    def at(self, node: fx.Node) -> Tensor | None:
        """Index of the feature that each element of a node's tensor came from, -1 for others.

        None if nothing of the source arrives there, or its way cannot be followed.
        """
        found = self._follow(node)
        return found if isinstance(found, Tensor) else None

    def features(self, node: fx.Node) -> Features | None:
        """The features that arrive at a node, or None as for ``at``."""
        found = self.at(node)
        if found is None:
            return None
        flat = torch.view_as_real(found) if found.is_complex() else found
        distinct = cast("list[float]", cast("Any", flat).unique().tolist())
        present = sorted(int(index) for index in distinct if index >= 0)
        return as_features(present) if present else None

    def _follow(self, node: fx.Node) -> Any:
        if node in self._known:
            return self._known[node]
        if self._order(node) < self._first or self._opaque(node):
            return None
        self._known[node] = None  # a node whose operands lead nowhere
        found = [(each, self._follow(each)) for each in operands(node)]
        known = {each: indices for each, indices in found if indices is not None}
        if known:
            self._known[node] = self._through(node, known)
        return self._known[node]

    def _through(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        kind, name = op_kind(node), op_name(node)
        if node.op != "call_module" and kind in (Kind.VIEW, Kind.JOIN) and name not in _NOT_RUN:
            return self._run(node, known)
        first = next(iter(known.values()))
        sizes = shape(node)
        if not isinstance(first, Tensor):
            return None
        if tuple(first.shape) == sizes or (first.is_complex() and first.dim() == len(sizes)):
            return first
        if first.dim() != len(sizes):
            return None
        # Pooled, resized or broadcast: what does not vary along an axis may change its size.
        for axis, size in enumerate(sizes):
            if first.shape[axis] != size:
                if varies_along(first, axis):
                    return None
                first = first.narrow(axis, 0, 1)
        return first.expand(sizes)

    def _run(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """Apply a view or a join to indices; tensors of other origin become -1."""

        def actual(each: fx.Node) -> Any:
            if each in known:
                return known[each]
            if each in operands(node):
                return torch.full(shape(each), _NONE, dtype=torch.float64)
            return each.meta["val"]

        args, kwargs = fx.map_arg((node.args, node.kwargs), actual)
        args, kwargs = cast("tuple[Any, ...]", args), cast("dict[str, Any]", kwargs)
        if op_name(node) == "pad":
            args, kwargs = (args[0], argument(node, 1, "pad")), {"value": _NONE}
            args = cast("tuple[Any, ...]", fx.map_arg(args, actual))
        try:
            if node.op == "call_method":
                # Indices may be strided otherwise than the model's tensors: views may copy here.
                name = "reshape" if node.target == "view" else cast("str", node.target)
                return getattr(args[0], name)(*args[1:], **kwargs)
            return cast("Callable[..., Any]", node.target)(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None  # indexed by data, say: where features go cannot be told


def as_features(indices: Iterable[int]) -> Features:
    """Indices as (start, stop) if they lie together, else as a sorted list."""
    present = sorted(set(indices))
    if present and present[-1] - present[0] + 1 == len(present):
        return present[0], present[-1] + 1
    return present


def origin_of(view: fx.Node) -> fx.Node:
    """The node that a tensor is a view of."""
    while view.op in ("call_function", "call_method") and op_kind(view) is Kind.VIEW:
        view = operands(view)[0]
    return view


def varies_along(indices: Tensor, axis: int) -> bool:
    """Whether indices differ from place to place along an axis."""
    if indices.is_complex() or indices.shape[axis] < 2:
        return False
    return bool((indices.narrow(axis, 0, 1) != indices).any())
