"""The driver's class as the analysis sees it: which modules matter, which methods lead to them."""

from __future__ import annotations

import functools
import inspect
import re
import types
from dataclasses import dataclass, field

from torch import nn

from surgery.capture.loops.callees import UNKNOWN
from surgery.capture.loops.source import names_in
from surgery.capture.loops.values import NOTHING, Value, items_of, join, tuple_of

_RUNNERS = frozenset({"forward", "__call__", "_call_impl", "_wrapped_call_impl"})
_ROUNDABOUT = frozenset({"getattr", "get_submodule", "_modules", "children", "named_children"})
_VIEWS = frozenset({"children", "values", "__iter__"})
_NAMED_VIEWS = frozenset({"named_children", "items"})
_ABSENT = object()
_WHOLE = "*"
WHOLE_BLOCK = Value(blocks=frozenset({_WHOLE}))
"""A block that gives itself when it is iterated over."""


@dataclass
class Driver:
    """The class whose code drives stacks.

    Attributes:
        cls: The stock class.
        members: The names of the blocks in each container, by the container's path.
        aliases: Attributes of the driver that were assigned something with a block in it.
        helpers: Methods and properties that return something with a block in it.
    """

    cls: type[nn.Module]
    members: dict[str, frozenset[str]]
    aliases: dict[str, Value] = field(default_factory=dict[str, Value])
    helpers: set[str] = field(default_factory=set[str])

    def element(self, value: Value) -> Value:
        """What iterating over, or indexing, a value gives."""
        found = [value.items or NOTHING, *(value.fields or ())]
        found += [self._module_element(path) for path in value.paths]
        if value.blocks or value.part:
            whole = value.blocks & WHOLE_BLOCK.blocks
            found.append(Value(blocks=whole, part=(value.blocks | value.part) - whole))
        return join(*found)

    def _module_element(self, path: str) -> Value:
        blocks = frozenset({path} if path in self.members else ())
        return join(Value(blocks=blocks), Value(paths=self.below(path)))

    def below(self, path: str) -> frozenset[str]:
        """Paths of the children of the module at ``path`` that are containers or lead to one."""
        start = f"{path}." if path else ""
        below = [one[len(start) :] for one in self.members if one and one.startswith(start)]
        return frozenset(start + rest.partition(".")[0] for rest in below if rest)

    def attribute(self, value: Value, name: str) -> Value:
        """What an attribute of a value may be."""
        found = [self._module_attribute(path, name) for path in value.paths]
        if value.blocks:
            found.append(_block_attribute(value, name))
        if value.part:
            found.append(Value(part=value.part))
        return join(*found)

    def _module_attribute(self, path: str, name: str) -> Value:
        if name == "_modules":
            return Value(paths=frozenset({path}))
        below = f"{path}.{name}" if path else name
        blocks = frozenset({path}) if name in self.members.get(path, ()) else frozenset[str]()
        paths = frozenset({below}) & self.below(path)
        mine = path == "" and self.method(name) is not None
        own = frozenset({name}) if mine else frozenset[str]()
        alias = self.aliases.get(name, NOTHING) if path == "" else NOTHING
        return join(Value(paths=paths, blocks=blocks, own=own), alias)

    def named(self, value: Value, pattern: re.Pattern[str] | None) -> Value:
        """What ``getattr`` with a name made at run time may give."""
        found: list[Value] = []
        for path in value.paths:
            start = len(path) + 1 if path else 0
            names = {below[start:] for below in self.below(path)}
            names |= self.members.get(path, frozenset()) | self.aliases.keys()
            fits = [name for name in names if pattern is None or pattern.fullmatch(name)]
            found += [self._module_attribute(path, name) for name in fits]
        if value.blocks or value.part:
            found.append(Value(part=value.blocks | value.part))
        return join(*found)

    def method_result(self, value: Value, name: str) -> Value | None:
        """What a call of a method of containers and lists gives; None if it is not one of those."""
        if not (value.paths or value.items or value.fields):
            return None
        if name in _VIEWS:
            return items_of(self.element(value))
        if name in _NAMED_VIEWS:
            return items_of(tuple_of(NOTHING, self.element(value)))
        if name in {"pop", "get", "__getitem__", "get_submodule", "popleft"}:
            return self.element(value)
        if name in {"copy", "keys"} or hasattr(nn.Module, name):
            return value if name == "copy" else NOTHING
        return None

    def method(self, name: str) -> types.FunctionType | property | None:
        """A method or property of the driver's class."""
        found = inspect.getattr_static(self.cls, name, None)
        return found if isinstance(found, types.FunctionType | property) else None

    def static(self, name: str) -> object:
        """What an attribute of the driver's class is, other than a method; UNKNOWN if nothing.

        None stands for what instances set (a checkpointing function).
        """
        found = inspect.getattr_static(self.cls, name, None)
        if isinstance(found, staticmethod):
            return inspect.unwrap(found.__func__)
        return UNKNOWN if found is None else found

    def is_iterable(self) -> bool:
        """Whether the driver itself can be looped over (`nn.Sequential`)."""
        return inspect.getattr_static(self.cls, "__iter__", _ABSENT) is not _ABSENT

    def mentions(self, code: types.CodeType) -> bool:
        """Whether a method could reach a block, by the names in it.

        It has to name the first step on the way to a container, an attribute or method that leads
        to a block, or to go about it in a roundabout way.
        """
        if "" in self.members and self.is_iterable():
            return True
        names = names_in(code)
        if not names.isdisjoint(self._first_steps | self.aliases.keys() | self.helpers):
            return True
        return not names.isdisjoint(_ROUNDABOUT) and not names.isdisjoint(self._later_steps)

    @functools.cached_property
    def _first_steps(self) -> frozenset[str]:
        first = {path.partition(".")[0] for path in self.members if path}
        return frozenset(first | self.members.get("", frozenset()) | self.members.keys())

    @functools.cached_property
    def _later_steps(self) -> frozenset[str]:
        """Names after the first step; for blocks of the driver itself, any name will do."""
        later = {part for path in self.members for part in path.split(".")[1:]}
        return frozenset(later | _ROUNDABOUT if "" in self.members else later)


def _block_attribute(value: Value, name: str) -> Value:
    if name in _RUNNERS:
        return Value(bound=value.blocks)
    return NOTHING if hasattr(nn.Module, name) else Value(part=value.blocks)
