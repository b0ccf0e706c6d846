"""Which tensors a node reads, which of them the inputs reach, and what a node does to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from torch import fx, nn

from surgery.capture.nodes import op_name, operands, spec, specs
from surgery.residuals.ops import Effect, effect_of, module_effect, weight_layers

_VIEWS = frozenset({Effect.LAYOUT, Effect.PART, Effect.STRIDE})


class Flow:
    """The floating-point tensors of a graph and how they follow from each other.

    Args:
        graph: From `surgery.capture`.
        root: The module that its targets belong to.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph = graph
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.effect: dict[fx.Node, Effect] = {}
        self.reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.users: dict[fx.Node, list[fx.Node]] = {}
        self.weights: dict[fx.Node, int] = {}
        self._root = root
        self._live: set[fx.Node] = set()
        self._learned: set[fx.Node] = set()
        self._written: dict[fx.Node, fx.Node] = {}
        self._parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
        for node in graph.nodes:
            self._visit(node)

    def is_live(self, node: fx.Node) -> bool:
        """Whether its value depends on what the forward is called with."""
        return node in self._live

    def is_float(self, node: fx.Node) -> bool:
        """Whether it has a tensor that gradients could flow through."""
        return any(found.dtype.is_floating_point or found.dtype.is_complex for found in specs(node))

    def live_reads(self, node: fx.Node) -> list[fx.Node]:
        """The operands that depend on what the forward is called with, each once."""
        return [each for each in dict.fromkeys(self.reads[node]) if each in self._live]

    def numel(self, node: fx.Node) -> int:
        """Number of elements of all its tensors."""
        return sum(math.prod(found.shape) for found in specs(node))

    def has_more(self, node: fx.Node) -> bool:
        """Whether the module of a node is more than torch's own, such as a norm that activates."""
        if node.op != "call_module":
            return False
        children = self._root.get_submodule(str(node.target)).children()
        return any(module_effect(child) is not Effect.LAYOUT for child in children)

    def terms(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The tensors that an addition adds."""
        return self.reads[node] if self.effect[node] is Effect.ADD else ()

    def _visit(self, node: fx.Node) -> None:
        self.users[node] = []
        self.effect[node] = effect = effect_of(node, self._root)
        read = tuple(self._operands(node))
        if effect in (Effect.CAST, Effect.LAYOUT):
            read = read[:1]  # the other one gives the type or the shape
        self.reads[node] = () if effect is Effect.MAKE else read
        for each in dict.fromkeys(self.reads[node]):
            self.users[each].append(node)
        if node.op == "get_attr" and node.target in self._parameters:
            self._learned.add(node)
        if node.op == "placeholder" or any(each in self._live for each in self.reads[node]):
            self._live.add(node)
        elif any(each in self._learned for each in self.reads[node]):
            self._learned.add(node)
        self._refine(node)
        if node.meta.get("mutates"):
            self._note_write(node)

    def _operands(self, node: fx.Node) -> Iterator[fx.Node]:
        """What it reads tensors from; what was written to in place, as it is after the write."""
        for operand in operands(node):
            written = operand
            while written in self._written:
                written = self._written[written]
            yield written

    def _note_write(self, node: fx.Node) -> None:
        """Everything that shares memory with the written tensor is read from ``node`` on."""
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node) or not self.reads[node]:
            return
        while target in self._written:
            target = self._written[target]
        if target is not node:
            self._written[target] = node
        # A write to a view is one to what it is a view of, which keeps its other elements.
        while self.effect[target] in _VIEWS and self.reads[target]:
            target = self.reads[target][0]
            if target.op == "call_module" or target is node:
                return
            self.reads[node] = (*self.reads[node], target)
            if self.numel(target) == self.numel(node):
                self._written[target] = node

    def _refine(self, node: fx.Node) -> None:
        """Tell products by a weight from products of activations, and count weight layers."""
        effect = self.effect[node]
        if node.op == "call_module":
            if effect is Effect.WEIGHT:
                module = self._root.get_submodule(str(node.target))
                self.weights[node] = weight_layers(module)
            return
        if effect is Effect.WEIGHT:
            if any(each in self._learned for each in self.reads[node]):
                self.weights[node] = 1
            elif all(each in self._live for each in self.reads[node]):
                self.effect[node] = Effect.MIX
            else:
                self.effect[node] = Effect.POOL  # a fixed kernel: blurring, Fourier features
        elif effect in (Effect.PART, Effect.LAYOUT):
            self.effect[node] = self._part_or_whole(node)
        elif effect is Effect.ADD and len(self.reads[node]) < 2:
            zero = any(isinstance(arg, int | float) and arg == 0 for arg in node.args)
            self.effect[node] = Effect.LAYOUT if zero else Effect.OTHER  # sum() starts from 0
        elif op_name(node) == "max" and len(self.reads[node]) > 1:
            self.effect[node] = Effect.OTHER

    def _part_or_whole(self, node: fx.Node) -> Effect:
        if not self.reads[node]:
            return Effect.OTHER
        before = self.reads[node][0]
        if spec(node) is None:
            return Effect.PART
        if self.numel(node) >= self.numel(before):
            return Effect.LAYOUT
        return Effect.STRIDE if _has_step(node.args[1:]) else Effect.PART


def _has_step(value: Any) -> bool:
    """Whether an index has a slice with a step in it."""
    if isinstance(value, slice):
        return cast("slice[Any, Any, Any]", value).step not in (None, 1)
    return isinstance(value, tuple | list) and any(map(_has_step, cast("list[Any]", value)))


def sweep_back(
    flow: Flow, start: Iterable[fx.Node], enters: Callable[[fx.Node], bool]
) -> set[fx.Node]:
    """Everything that ``start`` was computed from, as far as ``enters`` lets one in."""
    seen: set[fx.Node] = set()
    waiting = [node for node in start if enters(node)]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting.extend(each for each in flow.reads[node] if each not in seen and enters(each))
    return seen
