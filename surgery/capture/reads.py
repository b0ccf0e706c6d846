"""Guards on what a forward reads off its modules and their configs (see ``watch.py``)."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from surgery.capture.clone import Clones
from surgery.capture.objects import Lost, is_object
from surgery.capture.statics import is_static
from surgery.capture.structure import class_of
from surgery.capture.values import is_proxy, is_symbol, plain
from surgery.capture.watch import is_plain_object, watch_module, watch_object

if TYPE_CHECKING:
    from surgery.capture.tracing.symbols import Symbols
    from surgery.capture.tracing.writer import Writer

_MISSING = object()
# What nn.Module itself keeps; the forward's own questions are about the rest and `training`.
_FRAMEWORK = (frozenset(dir(nn.Module)) | frozenset(nn.Module().__dict__)) - {"training"}


class Reads:
    """Told of every read while a forward is traced.

    Args:
        writer: Writes the guards.
        symbols: Makes symbols of numbers.
        clones: The modules that are read.
        listening: False while something runs that is no part of the forward.
    """

    def __init__(
        self, writer: Writer, symbols: Symbols, clones: Clones, listening: Callable[[], bool]
    ) -> None:
        self._writer = writer
        self._symbols = symbols
        self._clones = clones
        self._listening = listening
        self._guarded: set[str] = set()
        self._numbers: dict[str, Any] = {}
        self._stand_ins: dict[tuple[str, int], Any] = {}
        self._objects: dict[int, tuple[str, Any]] = {}
        for clone in clones.modules():
            watch_module(clone, self)

    def path_of(self, value: Any) -> str | None:
        """How to reach the object that a stand-in stands for; None for anything else."""
        found = self._objects.get(id(value))
        return None if found is None else found[0]

    def read(self, holder: Any, name: str, value: Any) -> Any:
        """What the forward gets for ``holder.name``."""
        kind = class_of(value)
        known = kind is types.MethodType or name in _FRAMEWORK or _is_traced(value)
        if known or not self._listening():
            return value
        if kind in (int, float) or (name == "training" and kind is bool):
            return self._number(holder, name, value)
        if id(value) not in self._objects and is_plain_object(value):
            return self._stand_in(holder, name, value)
        if _is_settled(value) and self._is_held(holder, name, value):
            self._guard(self._path(holder, name), value)
        return value

    def wrote(self, holder: Any, name: str) -> None:
        """An attribute of an object that a module holds is about to change."""
        if self._listening():
            raise self._writer.error(
                f"assignment to {self._path(holder, name)}, an attribute of an object that the "
                "module holds: the graph cannot repeat it"
            )

    def _number(self, holder: Any, name: str, value: Any) -> Any:
        """A number as the symbol of its place; one that was computed or assigned as it is."""
        if not self._is_held(holder, name, value):
            return value
        path = self._path(holder, name)
        if id(holder) in self._objects:
            self._guard(path, value)
            return value
        if path not in self._numbers:
            self._numbers[path] = self._symbols.attribute(path, value)
        return self._numbers[path]

    def _stand_in(self, holder: Any, name: str, value: Any) -> Any:
        key = (self._path(holder, name), id(value))
        if key not in self._stand_ins:
            made = watch_object(value, self)
            self._stand_ins[key] = made
            self._objects[id(made)] = (key[0], value)
        return self._stand_ins[key]

    def _guard(self, path: str, value: Any) -> None:
        if path not in self._guarded:
            self._guarded.add(path)
            self._writer.guard_attribute(path, value)

    def _path(self, holder: Any, name: str) -> str:
        found = self._objects.get(id(holder))
        prefix = self._clones.path[id(holder)] if found is None else found[0]
        return f"{prefix}.{name}" if prefix else name

    def _is_held(self, holder: Any, name: str, value: Any) -> bool:
        """True where ``value`` is what the original holds there, not computed nor assigned."""
        held = self._held(holder, name)
        if held is value:
            return True
        copied = class_of(value) in _COPIED and class_of(held) is class_of(value)
        return copied and held == value

    def _held(self, holder: Any, name: str) -> Any:
        found = self._objects.get(id(holder))
        original = self._clones.original[id(holder)] if found is None else found[1]
        own = cast("dict[str, Any]", original.__dict__)
        if name in own:
            return plain(own[name])
        for cls in class_of(original).__mro__:
            if name in cls.__dict__:
                return cls.__dict__[name]
        # An empty slot, or something a ``__getattr__`` makes up.
        return getattr(original, name, _MISSING)


# Clones have copies of these; equal ones are the same to a forward.
_COPIED = frozenset({tuple, list, dict, torch.Size})


def _is_traced(value: Any) -> bool:
    """True for what the trace itself put there."""
    return is_symbol(value) or is_proxy(value) or is_object(value) or class_of(value) is Lost


def _is_settled(value: Any) -> bool:
    """True for a value that a guard can compare: None, flags, strings, and tuples of such."""
    kind = class_of(value)
    if issubclass(kind, tuple) or kind is list:
        return all(map(_is_settled, value))
    if kind is dict:
        return all(map(_is_settled, value)) and all(map(_is_settled, value.values()))
    return is_static(value) and not is_symbol(value)
