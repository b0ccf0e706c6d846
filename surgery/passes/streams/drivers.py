"""The modules whose code goes through the blocks of a holder, and the rewriting of that code."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from surgery.capture import Call
from surgery.capture.graft import check_graftable, graft, grafts, stock_class, ungraft
from surgery.capture.loops import Loops, Stack, loop_mixins
from surgery.errors import CaptureError
from surgery.passes.streams.segment import CHILD, segments_of
from surgery.tree import children, named_modules

RUNTIME = "surgery.passes.streams.steps:begin"
# On a driver: the stacks that its code was rewritten for, by container.
_STACKS = "_surgery_stacks"


def check_driven(
    model: nn.Module, holder: str, members: Sequence[str], calls: Sequence[Call]
) -> None:
    """Raise unless ``drive`` rewrites the code that calls the blocks of a holder.

    Args:
        model: The root.
        holder: Path of what holds the blocks.
        members: Names of the blocks that are to be rewired.
        calls: A call of each, from the trace.

    Raises:
        CaptureError: the code cannot be rewritten; names the loop and its line.
    """
    found = {
        path: (driver, _loops(driver, _with(driver, stack)))
        for path, driver, stack in _ancestors(model, holder, members)
    }
    for call in calls:
        if not any(_covers(path, *pair, call) for path, pair in found.items()):
            raise CaptureError(_why_not_driven(model, call, found[call.owner][1]))


def drive(model: nn.Module, holder: str) -> None:
    """Rewrite all code that goes through the blocks of a holder, whose segments are in place.

    Raises:
        ModelStateError: a module on the way was wrapped, or has a forward of its own.
    """
    drivers = list(_ancestors(model, holder, ()))
    for path, driver, stack in drivers:
        if _loops(driver, _with(driver, stack)).mixins:
            check_graftable(driver, path or stock_class(driver).__name__)
    for _, driver, stack in drivers:
        _rewrite(driver, _with(driver, stack))


def release(model: nn.Module, holder: str) -> None:
    """Fit the code that goes through the blocks of a holder to the segments that are left."""
    rewired = segments_of(model.get_submodule(holder)) is not None
    for _, driver, stack in _ancestors(model, holder, ()):
        rest = tuple(kept for kept in _present(driver) if kept.container != stack.container)
        _rewrite(driver, (*rest, stack) if rewired else rest)


def code_of(driver: nn.Module) -> dict[str, str]:
    """Name → text of the rewritten methods of a module; empty if none were."""
    return dict(_loops(driver, _present(driver)).sources)


def planned_code(model: nn.Module, holder: str, members: Sequence[str]) -> dict[str, str]:
    """``Class.method`` → text of every method that ``drive`` would rewrite."""
    return {
        f"{stock_class(driver).__name__}.{name}": text
        for _, driver, stack in _ancestors(model, holder, members)
        for name, text in _loops(driver, _with(driver, stack)).sources.items()
    }


def _rewrite(driver: nn.Module, stacks: tuple[Stack, ...]) -> None:
    """Make a driver's code that for these stacks, one class at a time."""
    wanted = _loops(driver, stacks).mixins
    old = [mixin for mixin in _loops(driver, _present(driver)).mixins if mixin not in wanted]
    present = grafts(driver)
    for mixin in wanted:
        if mixin not in present:
            graft(driver, mixin)
    for mixin in old:
        ungraft(driver, mixin)
    driver.__dict__.pop(_STACKS, None)
    if wanted:
        driver.__dict__[_STACKS] = stacks


def _present(driver: nn.Module) -> tuple[Stack, ...]:
    return cast("tuple[Stack, ...]", driver.__dict__.get(_STACKS, ()))


def _with(driver: nn.Module, stack: Stack) -> tuple[Stack, ...]:
    rest = tuple(kept for kept in _present(driver) if kept.container != stack.container)
    return (*rest, stack)


def _ancestors(
    model: nn.Module, holder: str, planned: Sequence[str]
) -> Iterator[tuple[str, nn.Module, Stack]]:
    """Path, module, and the holder as seen from there, of a holder and all that it lies in."""
    modules = dict(named_modules(model))
    members = _members(modules[holder], planned)
    path = holder
    while True:
        inner = holder.removeprefix(path).removeprefix(".")
        yield path, modules[path], Stack(inner, members)
        if not path:
            return
        path = path.rpartition(".")[0]


def _members(holder: nn.Module, planned: Sequence[str]) -> tuple[str, ...]:
    """Names of the blocks: all that a list holds; of other modules, those that are rewired."""
    if isinstance(holder, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return tuple(name for name in children(holder) if name != CHILD)
    found = segments_of(holder)
    rewired = [name for each in (found.segments() if found else ()) for name in each.members]
    names = {*rewired, *planned}
    return tuple(name for name in children(holder) if name in names)


def _loops(driver: nn.Module, stacks: tuple[Stack, ...]) -> Loops:
    if not stacks:
        return Loops((), ())
    return loop_mixins(stock_class(driver), stacks, RUNTIME)


def _covers(path: str, driver: nn.Module, loops: Loops, call: Call) -> bool:
    """Whether the statement that made a call lies in a method that is rewritten."""
    cls = stock_class(driver)
    for name in loops.methods:
        code = cast("types.FunctionType", inspect.unwrap(getattr(cls, name))).__code__
        last = max(line for _, _, line in code.co_lines() if line is not None)
        inside = code.co_firstlineno <= call.where.line <= last
        if inside and code.co_filename == call.where.file:
            return True
    # A call is placed at a statement of the model's; that of nn.Sequential is torch's.
    return call.owner == path and "forward" in loops.methods and isinstance(driver, nn.Sequential)


def _why_not_driven(model: nn.Module, call: Call, loops: Loops) -> str:
    for reason in loops.refused.values():
        return f"the code that calls {call.path} cannot be rewritten: {reason}"
    owner = stock_class(model.get_submodule(call.owner)).__name__
    return f"{owner} calls {call.path} at {call.where} in a way that cannot be rewritten"
