"""Finishing a captured forward from where a guard failed, along another variant."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from surgery.capture import analysis
from surgery.capture.codegen import Miss
from surgery.capture.contexts import Autocast, Change
from surgery.capture.guards import Guard, assign, expect
from surgery.capture.objects import Past
from surgery.errors import CaptureError

if TYPE_CHECKING:
    from surgery.capture.own import Capture


class Replay:
    """A call that got as far as a guard.

    Variants of one forward begin with the same nodes, up to the guard at which they part. What
    the generated code had computed by then is kept by the name of its node.

    Args:
        variant: What was running.
        module: ``self`` of the forward.
        values: Its bound arguments.
        extra: What it was given besides.
        miss: Where it stopped.
    """

    result: Any

    def __init__(
        self,
        variant: Capture,
        module: nn.Module,
        values: tuple[Any, ...],
        extra: tuple[Any, ...],
        miss: Miss,
    ) -> None:
        self.module = module
        self._values = values
        self._known: dict[str, Any] = {**miss.values, **variant.known(values, extra)}
        self._passed = self._before(variant, variant.code.inline[miss.index])

    def disturbed(self) -> bool:
        """True when what already ran wrote to a tensor that outlives the call."""
        return any(node.meta.get("mutates") and _writes_outside(node) for node in self._passed)

    def past(self) -> Past:
        """What already ran, for a new capture of the same call."""
        return Past(frozenset(node.name for node in self._passed), self._known)

    def can_continue(self, other: Capture) -> bool:
        """True when ``other`` is for this call, begins with what has run and went on like it."""
        if not other.accepts_values(self.module, self._values):
            return False
        nodes = list(other.graph.nodes)
        count = len(self._passed)
        if len(nodes) <= count or any(map(_differs, self._passed, nodes)):
            return False
        parting = nodes[count]
        if parting.target is not expect:
            return False
        value, expected = parting.args
        return self._value(value, other.constants) == expected

    def parting(self, other: Capture) -> str:
        """Where ``other`` does something else than what has run, for a message."""
        for mine, theirs in zip(self._passed, other.graph.nodes, strict=False):
            if _differs(mine, theirs):
                return f"{mine.format_node()} against {theirs.format_node()}"
        return "to the same guard, or to another call"

    def finish(self, other: Capture) -> Guard | None:
        """Run the rest of ``other``; the result is in ``result``, unless a guard is returned."""
        nodes = list(other.graph.nodes)
        for position in range(len(self._passed), len(nodes)):
            node = nodes[position]
            if node.op == "output":
                self.result = self._fill(node.args[0], other.constants)
                return None
            if node.target is expect:
                value, expected = node.args
                if self._value(value, other.constants) != expected:
                    self._passed = nodes[:position]
                    return cast(Guard, node.meta["guard"])
                continue
            with _contexts(node):
                self._known[node.name] = self._compute(node, other.constants)
        raise AssertionError("a graph ends with its output")

    def _before(self, variant: Capture, guard: Guard) -> list[fx.Node]:
        passed: list[fx.Node] = []
        for node in variant.graph.nodes:
            if node.meta.get("guard") is guard:
                break
            passed.append(node)
        return passed

    def _fill(self, value: Any, constants: Mapping[str, Any]) -> Any:
        return fx.map_arg(value, lambda node: self._value(node, constants))

    def _value(self, node: Any, constants: Mapping[str, Any]) -> Any:
        """The value of a node that has run, computed again if it was dropped and can be."""
        if not isinstance(node, fx.Node):
            return node
        if node.name in self._known:
            return self._known[node.name]
        lost = node.op == "call_module" or node.meta.get("mutates") or node.meta.get("written_by")
        if lost:
            raise CaptureError(
                f"{type(self.module).__name__}: {node.meta['where']}: this value is needed again "
                "after a guard failed, and was dropped",
            )
        with _contexts(node):
            self._known[node.name] = self._compute(node, constants)
        return self._known[node.name]

    def _compute(self, node: fx.Node, constants: Mapping[str, Any]) -> Any:
        if node.op == "get_attr":
            target = cast(str, node.target)
            return constants.get(target, None) if target in constants else _get(self.module, target)
        args = cast(tuple[Any, ...], self._fill(node.args, constants))
        kwargs = cast(dict[str, Any], self._fill(node.kwargs, constants))
        if node.op == "call_module":
            return self.module.get_submodule(cast(str, node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
        if node.target is assign:
            path, value = args
            owner, _, name = cast(str, path).rpartition(".")
            return setattr(self.module.get_submodule(owner), name, value)
        return cast(Callable[..., Any], node.target)(*args, **kwargs)


def _get(module: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(module) if path else module


def _differs(one: fx.Node, other: fx.Node) -> bool:
    same = one.op == other.op and one.target == other.target and one.name == other.name
    return not same or str(one.args) != str(other.args) or str(one.kwargs) != str(other.kwargs)


def _writes_outside(node: fx.Node) -> bool:
    """True when a writing node's target was not made by the graph itself."""
    target = node.args[0] if node.args else None
    if isinstance(target, fx.Node) and not analysis.holds_tensor(target):
        return False  # an object: `Replay.past` has what became of it
    while isinstance(target, fx.Node) and target.op in ("call_method", "call_function"):
        if target.target in _FACTORIES or not target.args:
            return False
        target = target.args[0]
    return isinstance(target, fx.Node)


_FACTORIES = frozenset({torch.zeros, torch.ones, torch.empty, torch.full, torch.zeros_like})


@contextlib.contextmanager
def _contexts(node: fx.Node) -> Generator[None]:
    with contextlib.ExitStack() as stack:
        for change in cast(tuple[Change, ...], node.meta.get("context", ())):
            stack.enter_context(_manager(change))
        yield


def _manager(change: Change) -> contextlib.AbstractContextManager[Any]:
    if isinstance(change, Autocast):
        return torch.autocast(change.device_type, dtype=change.dtype, enabled=change.enabled)
    return torch.no_grad()
