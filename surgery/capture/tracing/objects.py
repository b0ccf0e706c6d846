"""What a forward does to objects that are neither tensors nor numbers, done to the example too."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from surgery.capture import private
from surgery.capture.objects import ObjectProxy, Past, node_of, shadow_of
from surgery.capture.structure import map_structure
from surgery.capture.tracing.fakes import Fakes
from surgery.capture.tracing.proxies import Proxies, needs_grad
from surgery.capture.tracing.symbols import Symbols
from surgery.capture.tracing.writer import Writer
from surgery.capture.values import describe


class Objects:
    """Carries out what is done to the object proxies of one trace, and writes it down.

    Args:
        writer: Writes the nodes.
        fakes: Runs methods of the examples.
        symbols: Makes symbols of numbers.
        proxies: Makes of a value what the forward gets to see.
        past: What a call that is under way has done to its objects already.
    """

    def __init__(
        self, writer: Writer, fakes: Fakes, symbols: Symbols, proxies: Proxies, past: Past
    ) -> None:
        self._writer = writer
        self._fakes = fakes
        self._symbols = symbols
        self._proxies = proxies
        self._past = past

    def attribute(self, proxy: ObjectProxy, name: str) -> Any:
        """``object.name``: a method is recorded when called, anything else right away."""
        shadow = shadow_of(proxy)
        with self._fakes.pause():
            value = getattr(shadow, name)
            if callable(value) and getattr(value, "__self__", None) is shadow:
                return functools.partial(self._method, proxy, name)
            return self._proxies.present(self._writer.call(getattr, (proxy, name), None), value)

    def _method(self, proxy: ObjectProxy, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.call(proxy, name, args, kwargs)

    def call(
        self, proxy: ObjectProxy, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``object.name(...)``, carried out on the example object."""
        shadow, fakes = shadow_of(proxy), self._fakes
        with fakes.pause():
            node = self._writer.node("call_method", name, (proxy, *args), kwargs)
            node.meta["mutates"] = True
            node_of(proxy).meta.setdefault("written_by", []).append(node)
            if node.name in self._past.names:
                result = self._past_result(node)
            else:
                with private.no_autograd(), fakes.mode:
                    result = getattr(shadow, name)(*fakes.unwrap(args), **fakes.unwrap(kwargs))
            if result is shadow:
                return proxy
            return self._proxies.wrap(node, result, needs_grad((args, kwargs)), opaque=True)

    def _past_result(self, node: fx.Node) -> Any:
        """What a method gave when the call that is under way called it: once is enough."""
        if node.name not in self._past.values:
            raise self._writer.error(f"the call is past {describe(node)}, whose result is gone")

        def fake(leaf: Any) -> Any:
            return self._fakes.to_fake(leaf) if isinstance(leaf, torch.Tensor) else leaf

        return map_structure(self._past.values[node.name], fake)

    def truth(self, proxy: ObjectProxy) -> bool:
        """``bool(object)``."""
        value = bool(shadow_of(proxy))
        node = self._writer.call(bool, (proxy,), value)
        return bool(self._symbols.new(None, (node,), value))

    def items(self, proxy: ObjectProxy) -> Iterator[Any]:
        """``iter(object)``: as many items as the example has, with a guard on that."""
        with self._fakes.pause():
            items = list(shadow_of(proxy))
            return iter(self._proxies.present(self._writer.call(list, (proxy,), None), items))

    def assign(self, proxy: ObjectProxy, name: str, value: Any) -> None:
        """``object.name = value``."""
        node = self._writer.node("call_function", setattr, (proxy, name, value), {})
        node.meta["mutates"] = True
        setattr(shadow_of(proxy), name, self._fakes.unwrap(value))
