"""What a forward reads off its modules as plain Python values, put on record.

Flags, strings, tuples and the attributes of a config become part of a captured graph. The graph
is right only for modules that hold the same, so each such read is a guard. To see the reads, the
clones that a trace runs on get subclasses of their classes whose ``__getattribute__`` tells.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import nn

from surgery.capture.structure import class_of

_WATCHER = "__surgery_watcher__"
_ORIGINAL = "__surgery_original__"


class Watcher(Protocol):
    """Who is told of a read."""

    def read(self, holder: Any, name: str, value: Any) -> Any:
        """What to hand out for ``holder.name``, which is ``value``."""

    def wrote(self, holder: Any, name: str) -> None:
        """``holder.name`` is about to be assigned, and ``holder`` is no module."""


def watch_module(clone: nn.Module, watcher: Watcher) -> None:
    """Tell ``watcher`` what is read off a clone from now on."""
    if isinstance(clone, torch.jit.ScriptModule):  # its attributes are not Python's
        return
    clone.__dict__[_WATCHER] = watcher
    if not issubclass(type(clone), _Quiet):  # the clone of a clone is watched already
        clone.__class__ = _watched_module(type(clone))


def watch_object(held: Any, watcher: Watcher) -> Any:
    """A stand-in for a plain object, such as a config, that tells what is read off it."""
    kind = class_of(held)  # that of an outer trace's stand-in watches already
    made = object.__new__(kind if issubclass(kind, _Quiet) else _watched_object(kind))
    made.__dict__.update(held.__dict__)
    made.__dict__[_WATCHER] = watcher
    made.__dict__[_ORIGINAL] = held
    return made


def is_plain_object(value: Any) -> bool:
    """True for an instance of a class written in Python that only holds attributes."""
    kind = class_of(value)
    if isinstance(value, (nn.Module, torch.Tensor, types.ModuleType)) or callable(value):
        return False
    written = bool(kind.__flags__ & _WRITTEN_IN_PYTHON)
    return written and kind.__new__ is object.__new__ and kind.__basicsize__ == _BASIC_SIZE


# Py_TPFLAGS_HEAPTYPE: the class was made by a class statement.
_WRITTEN_IN_PYTHON = 1 << 9


class _Plain:
    pass


_BASIC_SIZE = _Plain.__basicsize__


_CLASS: Any = object.__dict__["__class__"]


class _Quiet:
    """First base of the subclasses, so that making one is no business of the class itself."""

    def __init_subclass__(cls, **options: Any) -> None:
        pass


@functools.cache
def _watched_module(cls: type[nn.Module]) -> type[nn.Module]:
    missing = cast("Callable[[Any, str], Any]", cls.__getattr__)

    def getattr_(self: Any, name: str) -> Any:
        return _told(self, name, missing(self, name))

    return _subclass(cls, {"__getattribute__": _getattribute(cls), "__getattr__": getattr_})


@functools.cache
def _watched_object(cls: type[Any]) -> type[Any]:
    def setattr_(self: Any, name: str, value: Any) -> None:
        watcher = self.__dict__.get(_WATCHER)
        if watcher is not None:
            watcher.wrote(self, name)
        cast("Any", cls).__setattr__(self, name, value)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return self.__dict__[_ORIGINAL].__reduce_ex__(protocol)  # copies are of the original

    names = {
        "__getattribute__": _getattribute(cls),
        "__setattr__": setattr_,
        "__reduce_ex__": reduce_ex,
    }
    return _subclass(cls, names)


def _getattribute(cls: type[Any]) -> Callable[[Any, str], Any]:
    get = cast("Callable[[Any, str], Any]", cls.__getattribute__)

    def getattribute(self: Any, name: str) -> Any:
        value = get(self, name)
        return value if name.startswith("__") else _told(self, name, value)

    return getattribute


def _told(holder: Any, name: str, value: Any) -> Any:
    watcher = object.__getattribute__(holder, "__dict__").get(_WATCHER)
    return value if watcher is None else watcher.read(holder, name, value)


def _subclass(cls: type[Any], names: dict[str, Any]) -> type[Any]:
    # ``self.__class__`` is what it was; it can be assigned, as that of any object.
    def get(self: Any) -> type[Any]:
        return cls

    def put(self: Any, other: type[Any]) -> None:
        _CLASS.__set__(self, other)

    stock = property(get, put)
    body = {**names, "__class__": stock, "__module__": cls.__module__, "__doc__": cls.__doc__}
    made = types.new_class(
        cls.__name__, (_Quiet, cls), {"metaclass": type(cls)}, lambda space: space.update(body)
    )
    made.__qualname__ = cls.__qualname__
    return made
