"""What a forward is told of a tensor besides its sizes: facts, and its contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from surgery.capture.tracing.fakes import Fakes
from surgery.capture.tracing.proxies import Proxies
from surgery.capture.tracing.symbols import Symbols
from surgery.capture.tracing.writer import Writer
from surgery.capture.values import Symbol, describe, is_proxy


class Facts:
    """Tells facts, with a guard on each if the graph is to run again.

    Args:
        writer: Writes the guards.
        fakes: Has the contents of tensors.
        symbols: Makes symbols of numbers.
        proxies: Makes of a value what the forward gets to see.
    """

    def __init__(self, writer: Writer, fakes: Fakes, symbols: Symbols, proxies: Proxies) -> None:
        self._writer = writer
        self._fakes = fakes
        self._symbols = symbols
        self._proxies = proxies
        self._told: set[tuple[Any, str]] = set()

    def tell(self, tensor: Any, name: str, value: Any) -> Any:
        """``x.dtype`` and the like."""
        if not self._guarded(tensor):
            return value
        if type(value) is bool:
            node = self._writer.call(getattr, (tensor, name), value)
            return self._symbols.new(None, (node,), value)
        if (tensor.node, name) not in self._told:
            self._told.add((tensor.node, name))
            node = self._writer.call(getattr, (tensor, name), value)
            self._writer.guard(name, describe(node), value, node)
        return value

    def tell_method(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> Any:
        """The same for a fact that a method tells (``x.is_contiguous()``)."""
        if not self._guarded(args[0]):
            return value
        node = self._writer.node("call_method", name, args, kwargs)
        node.meta["val"] = value
        return self._proxies.present(node, value, none_guard=False)

    def device(self, tensor: Any, device: torch.device) -> torch.device:
        """``x.device``: guarded as far as its type, and passed on as ``x.device`` itself."""
        if not self._guarded(tensor):
            return device
        node = self._writer.call(getattr, (tensor, "device"), device)
        if (tensor.node, "device") not in self._told:
            self._told.add((tensor.node, "device"))
            kind = self._writer.call(getattr, (node, "type"), device.type)
            self._writer.guard("device", describe(kind), device.type, kind)
        return self._writer.fresh_device(device, node)

    def contents(self, tensor: torch.Tensor, how: Callable[..., Any] | str) -> Symbol:
        """One number out of a tensor: ``bool(x)``, ``int(x)``, ``float(x)`` or ``x.item()``."""
        source = self._writer.node_of(tensor)
        with self._fakes.pause():
            answer = self._fakes.value(source)
            value = answer.value.item() if isinstance(how, str) else how(answer.value)
        kind = "call_method" if isinstance(how, str) else "call_function"
        node = self._writer.node(kind, how, (tensor,), {})
        node.meta["val"] = value
        return self._symbols.new(None, (node,), value, assumed=answer.assumed)

    def _guarded(self, tensor: Any) -> bool:
        return self._writer.options.replayable and is_proxy(tensor)
