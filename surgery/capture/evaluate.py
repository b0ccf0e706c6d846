"""Real values of traced nodes, computed only when the model asks for the contents of a tensor.

A trace runs on fake tensors. When a forward branches on data (``if mask.all()``) or makes a
shape of it (``nonzero``), the part of the graph that leads there is run for real. When that is
impossible (parameters on the meta device) or too expensive, the floating-point tensors it
would need are made up from a fixed seed, and everything integer is computed from those. A
mixture-of-experts router on meta thus routes at random, but consistently: top-k picks, one-hot
masks and token counts agree with each other. The guard that comes of it is marked ``assumed``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn

from surgery.capture import private
from surgery.capture.structure import leaves, map_structure
from surgery.capture.values import TensorSpec

# Elements read and written by the slice of the graph that has to run; about 0.1 s of CPU.
BUDGET = 1 << 25


class Answer(NamedTuple):
    """A real value, and whether it rests on made-up numbers."""

    value: Any
    assumed: bool


class Evaluator:
    """Runs slices of a graph that is still being written.

    Args:
        fetch: Gives the tensor of a ``get_attr`` node, or the example of a ``placeholder``.
        module: Gives the clone to run for a ``call_module`` node, and the module it stands for.
        budget: Elements a slice may touch before its numbers are made up instead.
    """

    def __init__(
        self,
        fetch: Callable[[fx.Node], Any],
        module: Callable[[str], tuple[nn.Module, nn.Module]],
        budget: int = BUDGET,
    ) -> None:
        self._fetch = fetch
        self._module = module
        self._budget = budget
        self._known: dict[fx.Node, Answer] = {}

    def value(self, node: fx.Node) -> Answer:
        """The real value of ``node``."""
        if node in self._known:
            return self._known[node]
        nodes = self._slice(node)
        real = self._affordable(nodes)
        if not real:
            nodes = self._slice(node, stop=_is_floating)
        shared = not any(part.meta.get("mutates") for part in nodes)
        known = self._known if shared else {}
        with private.for_real():
            for part in nodes:
                if part not in known:
                    known[part] = self._run(part, known, real=real)
        return known[node]

    def _slice(self, node: fx.Node, stop: Callable[[fx.Node], bool] | None = None) -> list[fx.Node]:
        """What has to run to know ``node``, in graph order, writes to its aliases included."""
        needed: set[fx.Node] = set()
        frontier = [node]
        while frontier:
            part = frontier.pop()
            if part in needed:
                continue
            needed.add(part)
            if stop is not None and stop(part):
                continue
            frontier.extend(part.all_input_nodes)
            frontier.extend(part.meta.get("written_by", ()))
        return [part for part in node.graph.nodes if part in needed]

    def _affordable(self, nodes: list[fx.Node]) -> bool:
        elements = 0
        for node in nodes:
            specs = leaves(node.meta.get("val"))
            if any(isinstance(spec, TensorSpec) and spec.device.type == "meta" for spec in specs):
                return False
            elements += sum(_numel(spec) for spec in specs)
            if node.op == "call_module":
                _, original = self._module(cast(str, node.target))
                tensors = [*original.parameters(), *original.buffers()]
                if any(_is_meta(tensor) for tensor in tensors):
                    return False
                elements += sum(tensor.numel() for tensor in tensors)
        return elements <= self._budget

    def _run(self, node: fx.Node, known: dict[fx.Node, Answer], *, real: bool) -> Answer:
        if not real and _is_floating(node):
            return Answer(_made_up(node), True)

        def filled(argument: Any) -> Any:
            return known[argument].value if isinstance(argument, fx.Node) else argument

        if node.op in ("get_attr", "placeholder"):
            return _given(self._fetch(node))
        args, kwargs = map_structure((node.args, node.kwargs), filled)
        if not real:
            args, kwargs = map_structure((args, kwargs), _off_meta)
        assumed = any(known[argument].assumed for argument in node.all_input_nodes)
        if node.op == "call_module":
            module, original = self._module(cast(str, node.target))
            return Answer(_call_module(module, original, args, kwargs), assumed)
        if node.op == "call_method":
            made = getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
        else:
            made = cast(Callable[..., Any], node.target)(*args, **kwargs)
        # What an object (a cache) holds may have no contents either.
        solid = _given(made) if node.meta.get("val") is None else Answer(made, False)
        return Answer(solid.value, assumed or solid.assumed)


def _given(value: Any) -> Answer:
    """A value from outside; tensors without contents are made up."""
    made_up: list[torch.Tensor] = []

    def solid(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if private.is_real(leaf):
            return leaf.detach().clone()
        # Ones are a mask that keeps everything, and a valid index nearly everywhere.
        made_up.append(leaf)
        return torch.ones(leaf.shape, dtype=leaf.dtype)

    return Answer(map_structure(value, solid), bool(made_up))


def _call_module(module: nn.Module, original: nn.Module, args: Any, kwargs: Any) -> Any:
    tensors = {name: tensor.clone() for name, tensor in original.named_buffers()}
    tensors.update(original.named_parameters())
    return torch.func.functional_call(module, tensors, args, kwargs)


def _off_meta(value: Any) -> Any:
    """Made-up numbers live on the CPU, so nothing beside them may be created on meta."""
    if isinstance(value, torch.device) and value.type == "meta":
        return torch.device("cpu")
    return value


def _made_up(node: fx.Node) -> Any:
    """Standard normal numbers of the node's shape, seeded by its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(node.name.encode()))

    def make(spec: Any) -> Any:
        if not isinstance(spec, TensorSpec):
            return spec
        if not spec.dtype.is_floating_point:
            return torch.zeros(spec.shape, dtype=spec.dtype)
        return torch.randn(spec.shape, generator=generator).to(spec.dtype)

    return map_structure(node.meta["val"], make)


def _is_floating(node: fx.Node) -> bool:
    """True for a node all of whose results are floating-point tensors."""
    specs = leaves(node.meta.get("val"))
    return bool(specs) and all(
        isinstance(spec, TensorSpec) and spec.dtype.is_floating_point for spec in specs
    )


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _numel(spec: object) -> int:
    return torch.Size(spec.shape).numel() if isinstance(spec, TensorSpec) else 0
