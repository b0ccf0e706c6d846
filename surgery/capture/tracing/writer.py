"""The graph of a trace while it is written: nodes with their places, and guards."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from torch import fx

from surgery.capture import private
from surgery.capture.clone import Clones
from surgery.capture.contexts import Ambient, Checkpoints
from surgery.capture.guards import Guard, expect
from surgery.capture.objects import Lost, is_object, node_of
from surgery.capture.statics import is_static
from surgery.capture.structure import map_structure
from surgery.capture.tracing.options import Options
from surgery.capture.values import TensorSpec, describe, is_proxy, is_symbol
from surgery.capture.where import raised_at, user_line
from surgery.errors import CaptureError


class Writer:
    """Writes one graph.

    Args:
        clones: The module tree the forward runs on.
        options: See `Options`.

    Attributes:
        options: The same.
        open: True until the forward is over.
        graph: What is written.
        guards: What Python was told, in order.
        constants: Tensors that no module owns, by ``get_attr`` target.
        checkpoints: The ``torch.utils.checkpoint`` calls of the forward.
        stands_for: How to reach what an object in the forward's hands stands for, if it does.
    """

    def __init__(self, clones: Clones, options: Options) -> None:
        self.options = options
        self.open = True
        self.graph = fx.Graph()
        self.guards: list[Guard] = []
        self.constants: dict[str, Any] = {}
        self.checkpoints = Checkpoints()
        self.stands_for: Callable[[Any], str | None] = _nothing
        self._clones = clones
        self._ambient = Ambient.now()
        self._owners: list[str] = []
        self._names = _tensor_names(clones)
        self._attributes: dict[int, fx.Node] = {}
        self._devices: dict[int, tuple[torch.device, fx.Node]] = {}
        self._alive: list[Any] = []  # their ids are keys above, so they must not be freed

    # -- whose forward it is -------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """Dotted path of the module whose forward is running."""
        return self._owners[-1] if self._owners else ""

    @property
    def inside(self) -> bool:
        """True while some module's forward is running."""
        return bool(self._owners)

    @contextlib.contextmanager
    def running(self, path: str) -> Generator[None]:
        """What runs inside belongs to the forward of the module at ``path``."""
        self._owners.append(path)
        yield
        self._owners.pop()  # not in a finally: an error is reported where it happened

    # -- nodes ---------------------------------------------------------------------------------

    def node(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        """Write a node; proxies among the arguments become the nodes that give them."""
        node = self.graph.create_node(kind, target, self.arguments(args), self.arguments(kwargs))
        self._place(node)
        return node

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], value: Any) -> fx.Node:
        """Write the call of a function that gives ``value``."""
        node = self.node("call_function", function, args, {})
        node.meta["val"] = value
        return node

    def item(self, node: fx.Node, key: Any) -> fx.Node:
        """Write ``node[key]``."""
        return self.call(operator.getitem, (node, key), None)

    def make(self, kind: type, fields: dict[str, Any]) -> fx.Node:
        """Write down the construction of an object: ``kind(**fields)``."""
        node = self.graph.call_function(kind, (), fields)
        self._place(node)
        return node

    def input(self, name: str, value: Any) -> fx.Node:
        """Write an input of the graph."""
        node = self.graph.placeholder(name)
        self._annotate(node, value)
        return node

    def attribute(self, path: str, value: Any) -> fx.Node:
        """Write ``self.path``, which gives ``value``."""
        node = self.graph.get_attr(path)
        self._annotate(node, value)
        return node

    def _place(self, node: fx.Node) -> None:
        node.meta["owner"] = self.owner
        node.meta["calls"] = tuple(self._owners)
        node.meta["where"] = user_line()
        if self.options.replayable:
            node.meta["context"] = self._ambient.changes()
            node.meta["checkpoint"] = self.checkpoints.running()

    def _annotate(self, node: fx.Node, value: Any) -> None:
        self._place(node)
        node.meta["val"] = map_structure(value, spec_of)

    # -- arguments -----------------------------------------------------------------------------

    def arguments(self, value: Any) -> Any:
        """``value`` with nodes for everything the trace made."""
        return map_structure(value, self._argument)

    def _argument(self, value: Any) -> Any:
        if is_proxy(value):
            return value.node
        if is_symbol(value):
            return value.fx_node
        if is_object(value):
            return node_of(value)
        if type(value) is Lost:
            raise value.error()
        if isinstance(value, torch.Tensor):
            return self._tensor_node(value)
        if type(value) is torch.device and id(value) in self._devices:
            return self._devices[id(value)][1]
        if self.options.replayable and not is_static(value) and not isinstance(value, fx.Node):
            return self._held_object(value)
        return value

    def _held_object(self, value: Any) -> fx.Node:
        """The node of an object that the module holds: a child, its config."""
        name = self.stands_for(value) or self._clones.path_of(value)
        if name is None:
            raise self.error(
                f"an object of class {type(value).__name__} was made here and is passed on: "
                "its construction is not part of the graph"
            )
        return self.attribute(name, None)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node that gives a tensor."""
        return cast(fx.Node, self._argument(tensor))

    def _tensor_node(self, tensor: torch.Tensor) -> fx.Node:
        """The ``get_attr`` node of a parameter, a buffer, or a tensor the model holds elsewhere."""
        key = id(tensor)
        if isinstance(tensor, private.FakeTensor) and key not in self._names:
            raise self.error("a tensor computed inside a leaf escaped without being returned")
        if key not in self._attributes:
            name = self._names.get(key)
            if name is None:
                name = f"_constant{len(self.constants)}"
                self.constants[name] = tensor
            self._alive.append(tensor)
            node = self.graph.get_attr(name)
            with private.without_torch_function():
                self._annotate(node, tensor)
            self._attributes[key] = node
        return self._attributes[key]

    def name_tensor(self, tensor: torch.Tensor, path: str) -> None:
        """From now on a tensor is what the model holds at ``path``."""
        self._names[id(tensor)] = path
        self._alive.append(tensor)

    def fresh_device(self, device: torch.device, node: fx.Node) -> torch.device:
        """A device as an object of its own, which is recognised as ``node`` when passed on."""
        fresh = torch.device(str(device))
        self._devices[id(fresh)] = (fresh, node)
        return fresh

    # -- guards and errors ---------------------------------------------------------------------

    def guard(
        self,
        kind: str,
        expression: str,
        expected: Any,
        node: fx.Node | None = None,
        *,
        assumed: bool = False,
    ) -> None:
        """Put down that Python was told ``expected``."""
        where = user_line()
        guard = Guard(kind, expression, expected, where.file, where.line, self.owner, assumed, node)
        self.guards.append(guard)
        if self.options.replayable and node is not None:
            marker = self.graph.call_function(expect, (node, expected))
            self._place(marker)
            marker.meta["guard"] = guard

    def guard_held(self, path: str, value: Any) -> None:
        """Guard what an attribute was before the forward assigned to it."""
        node = self.graph.get_attr(path)
        self._place(node)
        node.meta["val"] = value
        self.guard_identity(node, value)

    def guard_attribute(self, path: str, value: Any) -> None:
        """Guard a plain value that a module or its config holds."""
        node = self.attribute(path, None)
        self.guard("attribute", f"self.{path}", map_structure(value, _same), node)

    def guard_identity(self, node: fx.Node, value: Any) -> None:
        """Guard that ``node`` gives None, or this very object."""
        self.guard("none" if value is None else "object", describe(node), value, node)

    def guard_length(self, node: fx.Node, count: int) -> None:
        """Guard how many items ``node`` has."""
        length = self.call(len, (node,), count)
        self.guard("len", f"len({node.name})", count, length)

    def error(self, why: str, *, cause: BaseException | None = None) -> CaptureError:
        """A CaptureError for the statement that is running, or that raised ``cause``."""
        where = user_line() if cause is None else raised_at(cause)
        path = self.owner
        kind = type(self._clones.root.get_submodule(path)).__name__
        return CaptureError(f"cannot trace {path or 'the module'} ({kind}): {where}: {why}")

    def failed(self, error: Exception) -> CaptureError:
        """The CaptureError for an exception that came out of the forward."""
        return self.error(f"{type(error).__name__}: {error}", cause=error)


def spec_of(value: Any) -> Any:
    """What a node's ``meta["val"]`` holds for a value: the spec of a tensor, else the value."""
    return TensorSpec.of(value) if isinstance(value, torch.Tensor) else value


def inside_placeholder(node: fx.Node) -> bool:
    """True for an input of the graph, and for an item of one."""
    while node.target is operator.getitem:
        node = cast(fx.Node, node.args[0])
    return node.op == "placeholder"


def _nothing(_: Any) -> str | None:
    return None


def _same(value: Any) -> Any:
    return value


def _tensor_names(clones: Clones) -> dict[int, str]:
    """``id`` of every tensor held by a module → its dotted name, the first of a tied one's."""
    names: dict[int, str] = {}
    for module in clones.modules():
        prefix = clones.path[id(module)]
        for name, tensor in private.own_tensors(module):
            names.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)
    return names
