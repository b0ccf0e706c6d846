"""The dataflow of a whole model: every tensor operation between its weight layers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.capture import private
from surgery.capture.calls import Call
from surgery.capture.clone import Clones
from surgery.capture.guards import Guard
from surgery.capture.settle import settle
from surgery.capture.statics import is_static
from surgery.capture.structure import map_structure
from surgery.capture.tracing import Options, Tracer
from surgery.capture.values import is_proxy, is_symbol
from surgery.errors import CaptureError

# Layers whose inside says nothing about the architecture. Subclasses count: a rewritten or
# quantised Linear is still a Linear.
ATOMIC: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    private.CONVOLUTION,
    nn.Embedding,
    nn.EmbeddingBag,
    private.NORM_BASE,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.PReLU,
    *private.RECURRENT,
)


@dataclasses.dataclass(frozen=True)
class Trace:
    """A model's forward as one graph.

    Attributes:
        graph: See the package docstring for its nodes and their ``meta``.
        guards: What the forward's Python demanded, in order.
        constants: Tensors the forward used that no module owns, by ``get_attr`` target.
        calls: Every module call in the order they ended, with its arguments and its result.
    """

    graph: fx.Graph
    guards: tuple[Guard, ...]
    constants: Mapping[str, torch.Tensor]
    calls: tuple[Call, ...]

    @property
    def assumptions(self) -> tuple[Guard, ...]:
        """The guards whose data was made up, since it was not there or too expensive."""
        return tuple(guard for guard in self.guards if guard.assumed)


def is_atomic(path: str, module: nn.Module) -> bool:
    """True for a layer that `trace_model` shows as one ``call_module`` node."""
    return isinstance(module, ATOMIC) and path != ""


def trace_model(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Trace:
    """Trace ``model(*args, **kwargs)`` down to its atomic layers.

    Nothing is computed but shapes, unless the forward asks for the contents of a tensor. The
    model, its flags, buffers and caches and the random generators are left as they were.

    Args:
        model: Any module, on any device; on meta too.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.

    Raises:
        CaptureError: the forward does something that cannot be followed; names the module and
            the statement.
    """
    return settle(lambda options: _trace(model, args, dict(kwargs or {}), options), Options())


def _trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> Trace:
    clones = Clones(model, keep_caches=options.keep_caches)
    tracer = Tracer(clones, is_atomic, options)
    proxied_args, proxied_kwargs = placeholders(tracer, model, args, kwargs)
    try:
        with tracer.recording():
            result = clones.root(*proxied_args, **proxied_kwargs)
    except CaptureError:
        raise
    except Exception as error:
        raise tracer.writer.failed(error) from error
    tracer.writer.graph.output(_output(result))
    _drop_unused_shapes(tracer.writer.graph)
    return Trace(
        tracer.writer.graph,
        tuple(tracer.writer.guards),
        tracer.writer.constants,
        tuple(tracer.calls),
    )


def placeholders(
    tracer: Tracer, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a whole model as proxies, in the nesting of its arguments."""
    names = [*inspect.signature(model.forward).parameters]

    def proxied(name: str, value: Any) -> Any:
        def leaf(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                return tracer.proxies.input(name, item)
            return item if is_static(item) else tracer.fakes.copy_object(item)

        return map_structure(value, leaf)

    positional = [
        proxied(names[index] if index < len(names) else f"arg{index}", value)
        for index, value in enumerate(args)
    ]
    return tuple(positional), {name: proxied(name, value) for name, value in kwargs.items()}


def _output(value: Any) -> Any:
    """The nodes of a result, in its own nesting; what is no tensor and no number is None."""
    if is_proxy(value):
        return value.node
    if is_symbol(value):
        return value.fx_node
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {str(key): _output(item) for key, item in items}
    if isinstance(value, (tuple, list)):
        return tuple(_output(item) for item in cast(tuple[Any, ...], value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _output(getattr(value, field.name)) for field in fields}
    return None


def _drop_unused_shapes(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        reads_shape = node.target is getattr and node.args[1] == "shape"
        if reads_shape and not node.users:
            graph.erase_node(node)
