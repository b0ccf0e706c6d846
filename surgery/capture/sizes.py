"""Where the sizes of an intermediate tensor come from: the inputs' sizes, or fixed numbers.

A guard on the size of an intermediate tensor can be checked only when that tensor exists. Most such
sizes are those of an input, carried along; said so, they are checked before anything runs, and
the generated code reads better. Only rules that hold for every size are here; a size that none
covers stays a size of the tensor itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.capture.signs import ARITHMETIC, SIGNS
from surgery.capture.values import TensorSpec, is_symbol

# A size: a symbol over the inputs, a fixed number, or None where no rule tells.
Size = Any
Sizes = list[Size]

# The result is as large as the first argument.
_SAME = frozenset(
    {
        "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone",
        "detach", "neg", "exp", "sqrt", "rsqrt", "abs", "sin", "cos", "sigmoid", "tanh", "relu",
        "softmax", "log_softmax", "clamp", "dropout", "bool", "long", "int", "square", "log",
        "reciprocal", "silu", "gelu", "leaky_relu", "layer_norm", "rms_norm", "group_norm",
        "batch_norm", "normalize", "zeros_like", "ones_like", "empty_like", "add_", "sub_",
        "mul_", "div_", "masked_fill_", "copy_", "zero_", "fill_", "roll", "flip", "tril",
        "triu", "cumsum",
    }
)  # fmt: skip
# ... unless it is given a tensor to broadcast with.
_BOUNDED = frozenset({"clamp"})
# The result is as large as its arguments broadcast together.
_BROADCAST = frozenset(["masked_fill", "where", "maximum", "minimum", "pow"])
_BROADCAST_SIGNS = frozenset(SIGNS) - {ARITHMETIC["matmul"]}
_SAME_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.GELU, nn.SiLU)


class SizeRules:
    """Answers for one graph.

    Args:
        measure: Gives the symbols for the sizes of a tensor as such.
        number: Gives the symbol that a node of the graph was written for, if any.
        layer: Gives the module of a ``call_module`` node.
    """

    def __init__(
        self,
        measure: Callable[[fx.Node], Sizes],
        number: Callable[[fx.Node], Size],
        layer: Callable[[str], nn.Module],
    ) -> None:
        self._measure = measure
        self._number = number
        self._layer = layer
        self._known: dict[fx.Node, Sizes] = {}

    def of(self, node: fx.Node) -> Sizes:
        """The sizes of a tensor node, with None where no rule tells."""
        if node not in self._known:
            shape = cast(TensorSpec, node.meta["val"]).shape
            found = self._rule(node) or [None] * len(shape)
            agrees = len(found) == len(shape)
            self._known[node] = [
                size if agrees and _value(size) == actual else None
                for size, actual in zip(found, shape, strict=False)
            ] or found
        return self._known[node]

    def _rule(self, node: fx.Node) -> Sizes | None:
        if _is_input(node):
            return self._measure(node)
        if node.op == "get_attr":
            return list(cast(TensorSpec, node.meta["val"]).shape)
        if node.op == "call_module":
            return self._of_layer(node)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.target in _BROADCAST_SIGNS or name in _BROADCAST:
            return self._broadcast(node)
        first = node.args[0] if node.args else None
        if name == "cat":
            return self._cat(node)
        if node.target is operator.getitem and _is_split(first):
            return self._part(cast(fx.Node, first))
        if not isinstance(first, fx.Node) or not isinstance(first.meta.get("val"), TensorSpec):
            return None
        if name in _SAME and (name not in _BOUNDED or len(node.all_input_nodes) == 1):
            return self.of(first)
        rule = _RULES.get(cast(str, name))
        return None if rule is None else rule(self, self.of(first), node)

    def _of_layer(self, node: fx.Node) -> Sizes | None:
        layer = self._layer(cast(str, node.target))
        given = node.args[0] if node.args else None
        if not isinstance(given, fx.Node) or not isinstance(given.meta.get("val"), TensorSpec):
            return None
        if type(layer) is nn.Linear:
            return [*self.of(given)[:-1], layer.out_features]
        if type(layer) is nn.Embedding:
            return [*self.of(given), layer.embedding_dim]
        return self.of(given) if type(layer) in _SAME_LAYERS else None

    def _broadcast(self, node: fx.Node) -> Sizes | None:
        shapes = [
            self.of(argument)
            for argument in node.all_input_nodes
            if isinstance(argument.meta.get("val"), TensorSpec)
        ]
        rank = max(map(len, shapes), default=0)
        padded = [[1] * (rank - len(shape)) + shape for shape in shapes]
        columns: list[Sizes] = [list(column) for column in zip(*padded, strict=True)]
        return [_agreed(column) for column in columns]

    def _cat(self, node: fx.Node) -> Sizes | None:
        """All tensors are equally large, but for the dimension they are joined along."""
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        given: Any = _argument(node, 0, None)
        if not isinstance(dim, int) or not isinstance(given, (list, tuple)):
            return None
        shapes = [self.of(tensor) for tensor in cast("list[fx.Node]", given)]
        if len({len(shape) for shape in shapes}) != 1:  # an empty one may have any rank
            return None
        columns: list[Sizes] = [list(column) for column in zip(*shapes, strict=True)]
        joined: Sizes = [next((s for s in column if s is not None), None) for column in columns]
        joined[dim] = None
        return joined

    def _part(self, split: fx.Node) -> Sizes | None:
        """One of the results of ``chunk``, ``split`` or ``unbind``."""
        unbind = split.target in ("unbind", torch.unbind)
        dim = split.kwargs.get("dim", _argument(split, 1 if unbind else 2, 0))
        sizes = list(self.of(cast(fx.Node, split.args[0])))
        if not isinstance(dim, int):
            return None
        if unbind:
            del sizes[dim]
        else:
            sizes[dim] = None
        return sizes

    def getitem(self, sizes: Sizes, node: fx.Node) -> Sizes | None:
        """``x[...]``: what a full slice leaves alone."""
        index: Any = node.args[1]
        items = list(cast("tuple[Any, ...]", index)) if type(index) is tuple else [index]
        if not all(item is None or item is ... or isinstance(item, (int, slice)) for item in items):
            return None
        taken = sum(isinstance(item, (int, slice)) for item in items)
        if ... not in items:
            items.append(...)
        at = items.index(...)
        items[at : at + 1] = [slice(None)] * (len(sizes) - taken)
        rest = iter(sizes)
        result: Sizes = []
        for item in items:
            if item is None:
                result.append(1)
            elif isinstance(item, slice):
                size = next(rest)
                result.append(size if item == slice(None) else None)
            else:
                next(rest)
        return result

    def _given(self, size: Any) -> Size:
        """A size that was passed as an argument."""
        if isinstance(size, fx.Node):
            return self._number(size)
        return size if isinstance(size, int) and size >= 0 else None

    def view(self, sizes: Sizes, node: fx.Node) -> Sizes | None:
        """``view`` and ``reshape``: what was asked for."""
        asked = _asked(node)
        return None if asked is None else [self._given(size) for size in asked]

    def expand(self, sizes: Sizes, node: fx.Node) -> Sizes | None:
        """``expand``: what was asked for, and -1 for what was there."""
        asked = _asked(node)
        if asked is None:
            return None
        added = len(asked) - len(sizes)
        return [
            sizes[index - added] if size == -1 and index >= added else self._given(size)
            for index, size in enumerate(asked)
        ]

    def transpose(self, sizes: Sizes, node: fx.Node) -> Sizes | None:
        """``transpose(i, j)``."""
        if len(node.args) != 3 or not all(isinstance(dim, int) for dim in node.args[1:]):
            return None
        one, other = cast("tuple[int, int]", node.args[1:])
        swapped = list(sizes)
        swapped[one], swapped[other] = sizes[other], sizes[one]
        return swapped

    def permute(self, sizes: Sizes, node: fx.Node) -> Sizes | None:
        """``permute(...)``."""
        order = _asked(node)
        if order is None or not all(isinstance(dim, int) for dim in order):
            return None
        return [sizes[dim] for dim in order]

    def unsqueeze(self, sizes: Sizes, node: fx.Node) -> Sizes | None:
        """``unsqueeze(dim)``."""
        if len(node.args) != 2 or not isinstance(node.args[1], int):
            return None
        at = node.args[1] % (len(sizes) + 1)
        return [*sizes[:at], 1, *sizes[at:]]

    def attention(self, sizes: Sizes, node: fx.Node) -> Sizes | None:
        """``scaled_dot_product_attention(query, key, value)``: the query's, the value's width."""
        if len(node.args) < 3:
            return None
        key, value = (self.of(cast(fx.Node, argument)) for argument in node.args[1:3])
        batch = [_agreed(column) for column in zip(sizes[:-2], key[:-2], value[:-2], strict=False)]
        return [*batch, sizes[-2], value[-1]]


_RULES: dict[str, Callable[[SizeRules, Sizes, fx.Node], Sizes | None]] = {
    "getitem": SizeRules.getitem,
    "view": SizeRules.view,
    "reshape": SizeRules.view,
    "expand": SizeRules.expand,
    "transpose": SizeRules.transpose,
    "permute": SizeRules.permute,
    "unsqueeze": SizeRules.unsqueeze,
    "scaled_dot_product_attention": SizeRules.attention,
}


def _is_input(node: fx.Node) -> bool:
    """True for a parameter of the forward, or an item of one."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        if isinstance(node.args[0].meta.get("val"), TensorSpec):
            return False
        node = node.args[0]
    return node.op == "placeholder"


def _is_split(node: Any) -> bool:
    """True for a call that gives several parts of one tensor."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    base = node.args[0]
    tensor = isinstance(base, fx.Node) and isinstance(base.meta.get("val"), TensorSpec)
    return tensor and name in ("chunk", "split", "unbind")


def _argument(node: fx.Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def _asked(node: fx.Node) -> Sequence[Any] | None:
    """The sizes or dimensions of a call, given one by one or as one tuple."""
    rest = node.args[1:]
    if node.kwargs or not rest:
        return None
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        return cast("Sequence[Any]", rest[0])
    return rest


def _agreed(column: Sequence[Size]) -> Size:
    """The size that a dimension of broadcast tensors has; None where that cannot be said.

    Sizes of different inputs that agree are taken to do so always, and guards see to it.
    """
    if None in column:
        return None
    widest = max(column, key=_value)
    for size in column:
        if size is widest or (not is_symbol(size) and size == 1):
            continue
        matching = widest if _value(size) == _value(widest) else 1
        if size != matching:  # a guard, when either is a symbol
            return None
    return widest


def _value(size: Size) -> Any:
    return size.value if is_symbol(size) else size
