"""The numbers of a trace: sizes, arithmetic on them, and what Python demands of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from surgery.capture import private
from surgery.capture.clone import Clones
from surgery.capture.sizes import SizeRules
from surgery.capture.tracing.options import Options
from surgery.capture.tracing.writer import Writer
from surgery.capture.values import (
    SYMBOLS,
    Symbol,
    TensorProxy,
    TensorSpec,
    describe,
    is_proxy,
    is_symbol,
    read_attribute,
)


class Symbols:
    """Makes the symbolic numbers of one trace.

    Args:
        clones: The module tree the forward runs on.
        writer: Writes the nodes of numbers that are used, and guards on those that are demanded.
    """

    def __init__(self, clones: Clones, writer: Writer) -> None:
        self._writer = writer
        self._measured: dict[fx.Node, list[Any]] = {}
        self._numbers: dict[fx.Node, Symbol] = {}
        self._size_rules = SizeRules(
            self._measure, self._numbers.get, clones.original_root.get_submodule
        )

    @property
    def options(self) -> Options:
        """The trace's options."""
        return self._writer.options

    @property
    def open(self) -> bool:
        """True until the forward is over."""
        return self._writer.open

    def new(
        self,
        op: Callable[..., Any] | None,
        args: tuple[Any, ...],
        value: Any,
        *,
        assumed: bool = False,
    ) -> Symbol:
        """A symbol for ``op(*args)``, or for the one node that holds it; see `Symbol`."""
        return SYMBOLS[type(value)](self, op, args, value, assumed=assumed)

    def shape(self, tensor: torch.Tensor) -> torch.Size:
        """The symbolic shape of a tensor; a parameter's is fixed by the model."""
        if not is_proxy(tensor):
            with private.without_torch_function():
                return tensor.shape
        proxy = cast(TensorProxy, tensor)
        if proxy.sizes is None:
            known: list[Any] = [None] * len(proxy.fake.shape)
            if self.options.replayable and not proxy.node.meta.get("loose_rank"):
                known = self._size_rules.of(proxy.node)
            if None in known:
                own = self._measure(proxy.node)
                known = [
                    size if rule is None else rule for size, rule in zip(own, known, strict=True)
                ]
            proxy.sizes = torch.Size(known)
        return proxy.sizes

    def _measure(self, tensor: fx.Node) -> list[Any]:
        """The sizes of a tensor as sizes of that tensor, in one symbol each."""
        if tensor in self._measured:
            return self._measured[tensor]
        sizes = cast(TensorSpec, tensor.meta["val"]).shape
        node = self._writer.call(getattr, (tensor, "shape"), sizes)
        if self.options.replayable and tensor.meta.get("loose_rank"):
            rank = self._writer.call(len, (node,), len(sizes))
            self._writer.guard("rank", f"len({describe(node)})", len(sizes), rank)
        self._measured[tensor] = [
            self.new(operator.getitem, (node, index), size) for index, size in enumerate(sizes)
        ]
        return self._measured[tensor]

    def arithmetic(self, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """``op`` on symbolic numbers: a new symbol, nothing demanded."""
        value = op(*(arg.value if is_symbol(arg) else arg for arg in args))
        if type(value) not in SYMBOLS:
            return op(*(arg.demand("number") if is_symbol(arg) else arg for arg in args))
        assumed = any(is_symbol(arg) and arg.assumed for arg in args)
        symbol = self.new(op, args, value, assumed=assumed)
        if type(value) is bool and self.options.plain_bools:
            return bool(symbol)
        return symbol

    def demand(self, symbol: Symbol, kind: str) -> Any:
        """Python wants the value of a symbol: a guard."""
        if not symbol.demanded:
            symbol.demanded = True
            node = symbol.fx_node if self.options.replayable else None
            expression = describe(symbol)
            self._writer.guard(kind, expression, symbol.value, node, assumed=symbol.assumed)
        return symbol.value

    def attribute(self, path: str, value: Any) -> Any:
        """A number that a module holds, as a symbol: ``self.path``."""
        symbol = self.new(read_attribute, (path,), value)
        return symbol.demand("plain") if self.options.plain_numbers else symbol

    def emit(self, symbol: Symbol) -> fx.Node:
        """Write the node that computes a symbol."""
        node = self._emit(symbol)
        self._numbers[node] = symbol
        return node

    def _emit(self, symbol: Symbol) -> fx.Node:
        if symbol.op is None:
            return symbol.args[0]
        if symbol.op is read_attribute:
            return self._writer.attribute(symbol.args[0], symbol.value)
        return self._writer.call(symbol.op, symbol.args, symbol.value)
