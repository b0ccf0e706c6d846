"""Inputs and results that are neither tensors nor numbers: caches, model outputs, configs.

An `ObjectProxy` stands for such an object in the forward that is traced. What the forward does
to it (attributes, methods, items) is written into the graph as done to the object, so that the
captured forward does the same to whatever object it is given. A copy of the example object
plays along to know what comes back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import fx

from surgery.capture.structure import class_of
from surgery.errors import CaptureError

if TYPE_CHECKING:
    from surgery.capture.tracing.objects import Objects
    from surgery.capture.tracing.tracer import Tracer
    from surgery.capture.tracing.writer import Writer


class Lost:
    """What stands in a list or dict after a child wrote to it: it cannot be told what is there.

    Any use is a CaptureError.
    """

    def __init__(self, writer: Writer, path: str) -> None:
        self.__dict__["_why"] = (writer, path)

    def __getattr__(self, name: str) -> Any:
        raise self.error()

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        """Makes torch hand a call with this among its arguments to the trace, which refuses it."""
        return NotImplemented

    def error(self) -> CaptureError:
        """The error for a use of it."""
        writer, path = self.__dict__["_why"]
        return writer.error(f"{path} wrote to a list or dict that is read here")


@dataclasses.dataclass(frozen=True)
class Past:
    """What a call that stopped at a guard had done by then.

    Attributes:
        names: The nodes it had passed.
        values: The results that are still there, by node name.
    """

    names: frozenset[str]
    values: Mapping[str, Any]


_SLOTS = ("_tracer", "_fx_node", "_shadow")


class ObjectProxy:
    """An object of a trace: ``node`` gives it, ``shadow`` is the example.

    Attribute access is forwarded, so this class has nothing public of its own; the tracer uses
    `node_of` and `shadow_of`.
    """

    __slots__ = _SLOTS

    def __init__(self, tracer: Tracer, node: fx.Node, shadow: Any) -> None:
        object.__setattr__(self, "_tracer", tracer)
        object.__setattr__(self, "_fx_node", node)
        object.__setattr__(self, "_shadow", shadow)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return class_of(shadow_of(self))

    def __getattr__(self, name: str) -> Any:
        return _objects(self).attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _objects(self).assign(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return _objects(self).call(self, "__getitem__", (key,), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        _objects(self).call(self, "__setitem__", (key, value), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object."""
        return _objects(self).call(self, "__call__", args, kwargs)

    def __len__(self) -> int:
        return int(_objects(self).call(self, "__len__", (), {}))

    def __bool__(self) -> bool:
        return _objects(self).truth(self)

    def __contains__(self, item: Any) -> bool:
        return bool(_objects(self).call(self, "__contains__", (item,), {}))

    def __iter__(self) -> Iterator[Any]:
        return _objects(self).items(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{node_of(self).name}: {type(shadow_of(self)).__name__}>"


def _objects(proxy: ObjectProxy) -> Objects:
    return object.__getattribute__(proxy, "_tracer").objects


def node_of(proxy: ObjectProxy) -> fx.Node:
    """The node that gives the object."""
    return object.__getattribute__(proxy, "_fx_node")


def shadow_of(proxy: ObjectProxy) -> Any:
    """The example object."""
    return object.__getattribute__(proxy, "_shadow")


def is_object(value: object) -> bool:
    """True for an `ObjectProxy` (``isinstance`` would be answered by its ``__class__``)."""
    return type(value) is ObjectProxy
