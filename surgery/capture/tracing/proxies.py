"""What a traced forward gets to see: proxies for its inputs and for what its calls give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from surgery.capture import private
from surgery.capture.memory import Memories
from surgery.capture.objects import ObjectProxy
from surgery.capture.statics import is_static
from surgery.capture.structure import class_of, leaves, map_structure, rebuild, tensors
from surgery.capture.tracing.writer import inside_placeholder, spec_of
from surgery.capture.values import (
    SYMBOLS,
    TensorProxy,
    TensorSpec,
    describe,
    is_proxy,
    make_proxy,
)

if TYPE_CHECKING:
    from surgery.capture.tracing.tracer import Tracer

_SEQUENCES: tuple[type[Any], ...] = (tuple, list)

# Functions whose result drops dimensions as the sizes of their argument say.
_LOOSE_RANK = frozenset({"squeeze", "squeeze_"})
# Functions whose result has as many dimensions as the call says.
_GIVEN_RANK = frozenset({"view", "reshape", "expand", "permute"})


class Proxies:
    """Makes the proxies of one trace.

    Args:
        tracer: The trace, which its proxies report to.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._writer = tracer.writer
        self._fakes = tracer.fakes
        self._symbols = tracer.symbols
        self._memories = Memories()
        self._containers: list[tuple[fx.Node, Any, Any]] = []

    # -- values that are there -----------------------------------------------------------------

    def input(self, name: str, example: Any) -> Any:
        """An input of the graph, whatever it is: the value to hand to the forward."""
        shown = isinstance(example, torch.Tensor) or is_static(example)
        node = self._writer.input(name, example if shown else None)
        self._fakes.example(node, example)
        return self.present(node, example)

    def attribute(self, path: str, value: torch.Tensor) -> Any:
        """A tensor that a module holds besides its parameters and buffers."""
        return self.present(self._writer.graph.get_attr(path), value)

    def present(self, node: fx.Node, value: Any, *, none_guard: bool = True) -> Any:
        """What the forward gets to see of ``value``, which ``node`` gives.

        Args:
            node: Gives the value.
            value: Anything.
            none_guard: Whether a value that is neither tensor, number nor nested is guarded.
        """
        kind = class_of(value)
        if isinstance(value, torch.Tensor):
            fake = value if isinstance(value, private.FakeTensor) else self._fakes.to_fake(value)
            node.meta["val"] = TensorSpec.of(fake)
            return make_proxy(self._tracer, node, fake, requires_grad=value.requires_grad)
        if kind in SYMBOLS:
            if kind is bool and inside_placeholder(node):
                return value  # part of the signature
            node.meta["val"] = value
            return self._symbols.new(None, (node,), value)
        if issubclass(kind, _SEQUENCES):
            return self._present_items(node, value)
        if kind is dict:
            keyed = {key: self._present_item(node, key, item) for key, item in value.items()}
            return self._watched(node, keyed)
        if is_static(value):
            if none_guard and not inside_placeholder(node):
                self._writer.guard_identity(node, value)
            return value
        shadow = value if node.op != "placeholder" else self._fakes.copy_object(value)
        return ObjectProxy(self._tracer, node, shadow)

    def _present_items(self, node: fx.Node, value: Any) -> Any:
        if not inside_placeholder(node):
            self._writer.guard_length(node, len(value))
        items = [self._present_item(node, index, item) for index, item in enumerate(value)]
        return self._watched(node, rebuild(class_of(value), items))

    def _present_item(self, node: fx.Node, key: Any, item: Any) -> Any:
        return self.present(self._writer.item(node, key), item)

    def _watched(self, node: fx.Node, container: Any) -> Any:
        """A list or dict among the inputs, which the forward may write to."""
        if inside_placeholder(node) and type(container) in (list, dict):
            self._containers.append((node, container, container.copy()))
        return container

    def written_containers(self) -> Iterator[tuple[fx.Node, Any, Any]]:
        """(container, key, value) for each item of an input that the forward wrote.

        The key is None for one appended to a list.

        Raises:
            CaptureError: items were removed.
        """
        for node, now, before in self._containers:
            if len(now) < len(before):
                raise self._writer.error(f"items were removed from the input {describe(node)}")
            keyed = class_of(now) is dict
            pairs: Any = now.items() if keyed else enumerate(now)
            for key, value in pairs:
                if keyed and value is not before.get(key, now):
                    yield node, key, value
                if not keyed and (key >= len(before) or value is not before[key]):
                    yield node, key if key < len(before) else None, value

    # -- results -------------------------------------------------------------------------------

    def wrap(
        self,
        node: fx.Node,
        result: Any,
        requires_grad: bool,
        *,
        opaque: bool = False,
        counted: bool = False,
    ) -> Any:
        """Proxies for the result of a call.

        Args:
            node: The call.
            result: What it gave, in fake tensors.
            requires_grad: Whether its tensors take part in gradients.
            opaque: It comes from code that was not traced, so that its structure may differ at
                the next call.
            counted: So may the number of its tensors.
        """
        node.meta["val"] = map_structure(result, spec_of)
        node.meta["loose_rank"] = _has_loose_rank(node, opaque)
        return self._wrap_part(node, result, requires_grad, opaque=opaque, counted=counted)

    def _wrap_part(
        self, node: fx.Node, result: Any, requires_grad: bool, *, opaque: bool, counted: bool
    ) -> Any:
        kind = class_of(result)
        replayable = self._writer.options.replayable
        if isinstance(result, torch.Tensor):
            self._memories.add(node, result)
            floating = result.is_floating_point() or result.is_complex()
            return make_proxy(self._tracer, node, result, requires_grad=requires_grad and floating)
        if issubclass(kind, _SEQUENCES):
            if (opaque or counted) and replayable:
                self._writer.guard_length(node, len(result))
            items = [
                self._wrap_item(node, index, item, requires_grad, opaque)
                for index, item in enumerate(result)
            ]
            return rebuild(kind, items)
        if not opaque:
            return result
        if kind in SYMBOLS or is_static(result):
            return self.present(node, result, none_guard=replayable)
        return ObjectProxy(self._tracer, node, result)

    def _wrap_item(
        self, node: fx.Node, index: int, item: Any, requires_grad: bool, opaque: bool
    ) -> Any:
        if not opaque and not tensors(item):
            return item
        part = self._writer.item(node, index)
        part.meta["val"] = map_structure(item, spec_of)
        part.meta["loose_rank"] = opaque
        return self._wrap_part(part, item, requires_grad, opaque=opaque, counted=False)

    def wrap_written(
        self, node: fx.Node, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of a call that writes: its target under the new node."""
        node.meta["val"] = map_structure(result, spec_of)
        node.meta["mutates"] = True
        for target in leaves(kwargs.get("out", args[0] if args else None)):
            if is_proxy(target):
                self._memories.write(node, target.node, target.fake)
        for proxy in leaves((args, kwargs)):
            if is_proxy(proxy) and proxy.fake is result:
                proxy.node = node
                proxy.sizes = None
                return proxy
        needs = needs_grad((args, kwargs))
        return self._wrap_part(node, result, needs, opaque=False, counted=False)


def needs_grad(value: Any) -> bool:
    """Whether gradients are on and a tensor of ``value`` takes part in them."""
    if not torch.is_grad_enabled():
        return False
    with private.without_torch_function():
        return any(
            cast(TensorProxy, tensor).tracked if is_proxy(tensor) else tensor.requires_grad
            for tensor in tensors(value)
        )


def _has_loose_rank(node: fx.Node, opaque: bool) -> bool:
    """True when the graph alone does not say how many dimensions the result has."""
    name = getattr(node.target, "__name__", node.target)
    if opaque or name in _LOOSE_RANK:
        return True
    if name in _GIVEN_RANK:
        return False
    return any(argument.meta.get("loose_rank") for argument in node.all_input_nodes)
