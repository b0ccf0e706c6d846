"""Classes that carry rewritten methods, to be grafted onto a driver."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from surgery.capture.loops.driver import Driver
from surgery.capture.loops.findings import Findings
from surgery.capture.loops.rebuild import copied, foreign, reachable, rebuild
from surgery.capture.loops.rewrite import NotUnderstood, plan
from surgery.capture.loops.scanning import Analyst
from surgery.capture.loops.source import NoSource, edit, names_in, source_of
from surgery.capture.loops.targets import whole
from surgery.capture.loops.values import Value, join
from surgery.errors import CaptureError

DEFAULT_RUNTIME = "surgery.passes.streams.steps:begin"
_KEY = "__surgery_loops__"


@dataclass(frozen=True)
class Stack:
    """Blocks that a driver runs one after the other.

    Attributes:
        container: Dotted path from the driver to the module that holds them; "" for the driver.
        members: Their names in the container.
    """

    container: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Loops:
    """The rewritten methods of a driver.

    Attributes:
        mixins: Classes for `surgery.capture.graft.graft`, to be grafted in this order.
        methods: Names of the methods that were rewritten.
        refused: Why a method that runs blocks could not be; calling it on a grafted driver
            raises a `CaptureError` that says so.
        sources: The Python of each rewritten method.
    """

    mixins: tuple[type, ...]
    methods: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict[str, str])
    sources: dict[str, str] = field(default_factory=dict[str, str])


_Key = tuple[type[nn.Module], tuple[Stack, ...], str]
_lock = threading.RLock()
_made: dict[_Key, Loops] = {}


class LoopMixinType(type):
    """The class of mixin classes: generated, hence pickled by how they are made."""


def loop_mixins(
    cls: type[nn.Module], stacks: tuple[Stack, ...], runtime: str = DEFAULT_RUNTIME
) -> Loops:
    """Rewrite the methods of ``cls`` that run the blocks of ``stacks``.

    Args:
        cls: The stock class of the driver.
        stacks: The blocks whose calls are to go through the runtime.
        runtime: ``package.module:function`` of the runtime's ``begin``.

    Returns:
        The same object, with the same classes, for the same arguments.

    Raises:
        CaptureError: no stack was given.
    """
    if not stacks:
        raise CaptureError(f"no stack of {cls.__name__} was named", hint="name at least one")
    key = (cls, stacks, runtime)
    with _lock:
        if key not in _made:
            _made[key] = _Maker(cls, stacks, runtime).make()
        return _made[key]


def loop_mixin(cls: type[nn.Module], stacks: tuple[Stack, ...], runtime: str, index: int) -> type:
    """One of the classes of `loop_mixins`; what a pickle of it calls."""
    return loop_mixins(cls, stacks, runtime).mixins[index]


def loops_of(mixin: type) -> Loops | None:
    """What `loop_mixins` made a class for, with the sources of its methods; None for others."""
    key = mixin.__dict__.get(_KEY)
    return None if key is None else loop_mixins(*key[:3])


def _reduce(cls: type) -> str | tuple[Any, ...]:
    key = cls.__dict__.get(_KEY)
    # A class made from a mixin by others is a global like any other.
    return cls.__qualname__ if key is None else (loop_mixin, key)


copyreg.pickle(LoopMixinType, _reduce)  # type: ignore[arg-type]


class _Maker:
    """Makes the mixins of one driver."""

    def __init__(self, cls: type[nn.Module], stacks: tuple[Stack, ...], runtime: str) -> None:
        self.cls = cls
        self.stacks = stacks
        self.runtime = runtime
        members: dict[str, frozenset[str]] = {}
        for stack in stacks:
            known = members.get(stack.container, frozenset())
            members[stack.container] = known | frozenset(stack.members)
        self.driver = Driver(cls, members)
        self.begin = _import(runtime)
        self.methods: dict[str, None] = {}
        self.refused: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self._in_full: frozenset[str] | None = None

    def make(self) -> Loops:
        analyst = self._learn()
        parts: dict[type, dict[str, Any]] = {}
        for owner, name, attribute in self._attributes():
            new = self._rewritten(analyst, owner, name, attribute)
            if new is not None:
                parts.setdefault(self._place(owner, name), {})[name] = new
        order = [klass for klass in reversed(self.cls.__mro__) if klass in parts]
        mixins = tuple(self._mixin(owner, parts[owner], index) for index, owner in enumerate(order))
        return Loops(mixins, tuple(self.methods), self.refused, self.sources)

    # What there is ---------------------------------------------------------------------------

    def _attributes(self) -> Iterator[tuple[type, str, Any]]:
        for owner in self.cls.__mro__:
            if owner is nn.Module or owner is object:
                continue
            for name, attribute in tuple(vars(owner).items()):
                yield owner, name, attribute

    def _functions(self) -> Iterator[tuple[str, types.FunctionType]]:
        for _, name, attribute in self._attributes():
            found = attribute.fget if isinstance(attribute, property) else attribute
            if isinstance(found, types.FunctionType):
                yield name, found

    def _learn(self) -> Analyst:
        """Find the attributes and helpers of the driver that lead to blocks.

        ``self.last = self.layers[-1]`` makes an alias, ``def head(self): return self.layers[:2]`` a
        helper; what mentions either can reach a block as well.
        """
        while True:
            analyst = Analyst(self.driver)
            before = self.driver.aliases.copy(), self.driver.helpers.copy()
            for name, function in self._functions():
                for one in reachable(function):
                    if self.driver.mentions(one.__code__):
                        self._learn_from(name, _scan(analyst, one))
            if before == (self.driver.aliases, self.driver.helpers):
                return analyst

    def _learn_from(self, name: str, findings: Findings | None) -> None:
        if findings is None:
            return
        for attribute, value in findings.aliases.items():
            known = self.driver.aliases.get(attribute, Value())
            self.driver.aliases[attribute] = join(known, value)
        if findings.returns != Value() and name not in self.driver.members.get("", ()):
            self.driver.helpers.add(name)

    # What becomes of it ----------------------------------------------------------------------

    def _rewritten(self, analyst: Analyst, owner: type, name: str, attribute: Any) -> Any:
        """What to put in place of an attribute of a class; None to leave it."""
        if name in {"__init__", "__new__"}:
            return None
        if isinstance(attribute, property):
            return self._rewritten_property(analyst, owner, name, attribute)
        if not isinstance(attribute, types.FunctionType):
            return self._other(owner, name, attribute)
        replaced: dict[types.FunctionType, types.FunctionType] = {}
        try:
            for one in reachable(attribute):
                if self.driver.mentions(one.__code__):
                    new = self._new_function(analyst, name, one)
                    replaced |= {} if new is None else {one: new}
            for held, holder in foreign(attribute):
                if self.driver.mentions(held.__code__) and self._runs(analyst, held):
                    raise NotUnderstood(f"it is wrapped by a {type(holder).__qualname__}")
        except NotUnderstood as error:
            return self._stub(owner, name, attribute, str(error))
        if not replaced:
            return None
        self.methods[name] = None
        return rebuild(attribute, replaced)

    def _runs(self, analyst: Analyst, function: types.FunctionType) -> bool:
        try:
            return plan(source_of(function), analyst.method(function)) is not None
        except NoSource as error:
            raise NotUnderstood(str(error)) from None

    def _new_function(
        self, analyst: Analyst, name: str, function: types.FunctionType
    ) -> types.FunctionType | None:
        try:
            source = source_of(function)
        except NoSource as error:
            if function.__code__.co_name == name and not _is_dunder(name):
                raise NotUnderstood(str(error)) from None
            return None
        rewriting = plan(source, analyst.method(function), self._run_in_full(analyst))
        if rewriting is None:
            return None
        added = {rewriting.begin: self.begin, rewriting.whole: whole}
        edited = edit(source, rewriting.insertions, tuple(added))
        self.sources[name] = edited.text
        return _with_cells(function, edited.code, added)

    def _run_in_full(self, analyst: Analyst) -> frozenset[str]:
        """Lists of blocks that some method runs; blocks with names of their own do not count."""
        if self._in_full is None:
            runs = [run for findings in analyst.known() for run in findings.runs.values()]
            lists = {
                path
                for path, members in self.driver.members.items()
                if all(name.isdigit() for name in members)
            }
            self._in_full = frozenset(path for run in runs for path in run.containers) & lists
        return self._in_full

    def _rewritten_property(
        self,
        analyst: Analyst,
        owner: type,
        name: str,
        attribute: property,
    ) -> property | None:
        get = attribute.fget
        if not isinstance(get, types.FunctionType):
            return None
        new = self._rewritten(analyst, owner, name, get)
        return None if new is None else property(new, attribute.fset, attribute.fdel)

    def _other(self, owner: type, name: str, attribute: Any) -> Any:
        """An attribute that is no plain function; a callable one may hide a loop."""
        if isinstance(attribute, staticmethod | classmethod | type):
            return None  # none of these is given the driver
        held = getattr(attribute, "__wrapped__", getattr(attribute, "func", None))
        if isinstance(held, types.FunctionType):
            if self.driver.mentions(held.__code__):
                kind = type(attribute).__qualname__
                return self._stub(owner, name, held, f"it is wrapped by a {kind}")
            return None
        if name == "forward" and callable(attribute):
            return self._stub(owner, name, attribute, "it has no Python source")
        return None

    def _stub(self, owner: type, name: str, attribute: Any, reason: str) -> Any:
        full = f"{owner.__qualname__}.{name} runs blocks and could not be rewritten: {reason}"
        if self._is_reached(owner, name):
            self.refused.setdefault(name, full)

        def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            raise CaptureError(full, hint="rewrite another scope, or report the loop")

        if isinstance(attribute, types.FunctionType):
            functools.update_wrapper(refuse, attribute)
        else:
            refuse.__name__ = name
        return refuse

    # The classes -----------------------------------------------------------------------------

    def _is_reached(self, owner: type, name: str) -> bool:
        """Whether a class's method can run: not hidden, or what hides it calls ``super()``."""
        for klass in self.cls.__mro__[: self.cls.__mro__.index(owner)]:
            hiding = vars(klass).get(name)
            if isinstance(hiding, types.FunctionType):
                return any("super" in names_in(one.__code__) for one in reachable(hiding))
        return True

    def _place(self, owner: type, name: str) -> type:
        """Right above the class that defines a method if another hides it; else on top."""
        first = next(klass for klass in self.cls.__mro__ if name in vars(klass))
        return self.cls if first is owner else owner

    def _mixin(self, owner: type, namespace: dict[str, Any], index: int) -> type:
        inner = owner is not self.cls
        bases = (owner,) if inner else ()
        metaclass = LoopMixinType
        if type(self.cls) is not type:
            metaclass = _joint(type(self.cls))
        body = {
            **namespace,
            "__module__": __name__,
            "__qualname__": f"{owner.__name__}Loops",
            _KEY: (self.cls, self.stacks, self.runtime, index),
        }
        return types.new_class(
            f"{owner.__name__}Loops", bases, {"metaclass": metaclass}, lambda to: to.update(body)
        )


def _with_cells(
    function: types.FunctionType, code: types.CodeType, added: dict[str, Any]
) -> types.FunctionType:
    """The function with new code: its own cells by name, and new ones for what was added."""
    cells = {name: types.CellType(value) for name, value in added.items()}
    cells |= zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return copied(function, code, tuple(cells[free] for free in code.co_freevars))


@functools.cache
def _joint(metaclass: type) -> type[LoopMixinType]:
    made = type(f"LoopMixin{metaclass.__name__}", (LoopMixinType, metaclass), {})
    copyreg.pickle(made, _reduce)  # type: ignore[arg-type]
    return cast("type[LoopMixinType]", made)


def _scan(analyst: Analyst, function: types.FunctionType) -> Findings | None:
    with contextlib.suppress(NoSource):
        return analyst.method(function)
    return None


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _import(runtime: str) -> Callable[..., Any]:
    module, _, name = runtime.partition(":")
    return getattr(importlib.import_module(module), name)
