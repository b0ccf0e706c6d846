"""The modules whose code goes through the blocks of a holder, and the rewriting of that code."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn

from surgery.capture import Call, Trace
from surgery.capture.graft import check_graftable, graft, grafts, stock_class, ungraft
from surgery.capture.loops import Loops, Stack, loop_mixins
from surgery.errors import CaptureError, ModelStateError
from surgery.passes.streams import graph_driver
from surgery.passes.streams.graph_driver import (
    Captured,
    driven,
    driving_mixin,
    inlined,
    innermost_driver,
    outermost_driver,
    plan_capture,
)
from surgery.passes.streams.holders import blocks
from surgery.passes.streams.segment import segments_of
from surgery.tree import children, named_modules

RUNTIME = "surgery.passes.streams.steps:begin"
# On a driver: the stacks that its code was rewritten for, by container.
_STACKS = "_surgery_stacks"
# On a driver: those of them that its code could not be rewritten for, so that it was captured.
_CAPTURED = "_surgery_captured"


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
    # By itself: a method that is rewritten for another stack may leave this one out.
    found = {
        path: (driver, _loops(driver, (stack,)))
        for path, driver, stack in _ancestors(model, holder, members)
    }
    for call in calls:
        if not any(_covers(path, *pair, call) for path, pair in found.items()):
            loops = found[call.owner][1] if call.owner in found else Loops((), ())
            raise CaptureError(_why_not_driven(model, call, loops))


def plan_driver(
    model: nn.Module,
    trace: Trace,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
    *,
    holder: str,
    members: Sequence[str],
    calls: Sequence[Call],
) -> Captured | None:
    """How the code that calls the blocks of a holder is to change.

    Args:
        model: The root.
        trace: The whole model's.
        example: Positional and keyword arguments of the model.
        holder: Path of what holds the blocks.
        members: Names of the blocks that are to be rewired.
        calls: A call of each, from the trace.

    Returns:
        None where the code can be rewritten; otherwise the capture to use instead.

    Raises:
        CaptureError: neither can be done; names the loop and its line.
    """
    try:
        check_driven(model, holder, members, calls)
    except CaptureError as refused:
        try:
            driver = innermost_driver(trace, holder, calls)
            return plan_capture(
                model,
                example,
                driver=driver,
                holder=holder,
                members=members,
                inline=inlined(trace, driver, calls),
            )
        except CaptureError as error:
            raise CaptureError(
                f"{refused.message}; nor can its graph be rewired instead: {error.message}",
                hint=error.hint,
            ) from None
    return None


def plan_across(
    model: nn.Module,
    trace: Trace,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
    *,
    holder: str,
    members: Sequence[str],
    calls: Sequence[Call],
) -> Captured:
    """The capture of the driver of several stacks, for a history that goes through all of them.

    Takes the same arguments as `plan_driver`.

    Raises:
        CaptureError: the driver cannot be captured.
    """
    driver = outermost_driver(model, trace, holder, calls)
    return plan_capture(
        model,
        example,
        driver=driver,
        holder=holder,
        members=members,
        inline=inlined(trace, driver, calls),
    )


def drive(model: nn.Module, holder: str, captured: Captured | None = None) -> None:
    """Rewrite all code that goes through the blocks of a holder, whose segments are in place.

    Args:
        model: The root.
        holder: Path of what holds the blocks.
        captured: What `plan_driver` gave.

    Raises:
        ModelStateError: a module on the way was wrapped, or has a forward of its own.
    """
    captured = captured or _capture_of(model, holder)
    drivers = [each for each in _ancestors(model, holder, ()) if _is_own(each[0], captured)]
    for path, driver, stack in drivers:
        if _is_driver(path, captured) or _loops(driver, _with(driver, stack)).mixins:
            check_graftable(driver, path or stock_class(driver).__name__)
            graph_driver.check_not_inlined(driver, path)
    if captured is not None:
        _check_inlined(model.get_submodule(captured.driver), captured.inline)
    for path, driver, stack in drivers:
        added = captured if _is_driver(path, captured) else None
        _rewrite(driver, _with(driver, stack), added)


def _capture_of(model: nn.Module, holder: str) -> Captured | None:
    """How the driver of a holder was captured, if one was."""
    for _, driver, stack in _ancestors(model, holder, ()):
        for captured in _captured(driver):
            if captured.container == stack.container:
                return captured
    return None


def _is_own(path: str, captured: Captured | None) -> bool:
    """Whether the code of a module stands for itself, and is not part of a captured driver's."""
    if captured is None or not path.startswith(captured.driver):
        return True
    return path == captured.driver


def _check_inlined(driver: nn.Module, paths: Iterable[str]) -> None:
    """Raise if a module whose forward is to become part of a driver's cannot be closed."""
    for path in paths:
        module = driver.get_submodule(path)
        check_graftable(module, path)
        if _present(module):
            raise ModelStateError(
                f"{path} was rewired already, and its forward would become part of the one of "
                f"{stock_class(driver).__name__}",
                hint="undo the earlier rewrite, or name all stacks in one rule",
            )


def _is_driver(path: str, captured: Captured | None) -> bool:
    return captured is not None and captured.driver == path


def check_released(model: nn.Module, holder: str) -> None:
    """Raise what ``release`` would raise.

    Raises:
        ModelStateError: the class of a module that was rewritten has changed since.
    """
    for path, driver, _ in _ancestors(model, holder, ()):
        if _present(driver):
            check_graftable(driver, path or stock_class(driver).__name__)
        for inner in _inline(_captured(driver)):
            check_graftable(driver.get_submodule(inner), f"{path}.{inner}" if path else inner)


def release(model: nn.Module, holder: str) -> None:
    """Fit the code that goes through the blocks of a holder to the segments that are left."""
    rewired = segments_of(model.get_submodule(holder)) is not None
    captured = _capture_of(model, holder)
    for path, driver, stack in _ancestors(model, holder, ()):
        if not _is_own(path, captured):
            continue
        rest = tuple(kept for kept in _present(driver) if kept.container != stack.container)
        _rewrite(driver, (*rest, stack) if rewired else rest)


def code_of(driver: nn.Module) -> dict[str, str]:
    """Name → text of the rewritten methods of a module; empty if none were."""
    if driven(driver) is not None:
        return graph_driver.code_of(driver)
    return dict(_loops(driver, _present(driver)).sources)


def planned_code(
    model: nn.Module, holder: str, members: Sequence[str], captured: Captured | None = None
) -> dict[str, str]:
    """``Class.method`` → text of every method that ``drive`` would rewrite."""
    found: dict[str, str] = {}
    for path, driver, stack in _ancestors(model, holder, members):
        texts = _loops(driver, _with(driver, stack)).sources
        if captured is not None and _is_driver(path, captured):
            texts = graph_driver.sources(driving_mixin(driver, (stack,), [captured]))
        found.update({f"{stock_class(driver).__name__}.{name}": t for name, t in texts.items()})
    return found


def _rewrite(driver: nn.Module, stacks: tuple[Stack, ...], added: Captured | None = None) -> None:
    """Make a driver's code that for these stacks, one class at a time."""
    before = _captured(driver)
    containers = {stack.container for stack in stacks}
    kept = tuple(one for one in before if one.container in containers and one != added)
    captured = kept if added is None else (*kept, added)
    wanted = _mixins(driver, stacks, captured)
    old = [mixin for mixin in _mixins(driver, _present(driver), before) if mixin not in wanted]
    present = grafts(driver)
    for mixin in wanted:
        if mixin not in present:
            graft(driver, mixin)
    for mixin in old:
        ungraft(driver, mixin)
    graph_driver.close(driver, _inline(before), _inline(captured))
    for name, value in ((_STACKS, stacks if wanted else ()), (_CAPTURED, captured)):
        driver.__dict__.pop(name, None)
        if value:
            driver.__dict__[name] = value


def _mixins(
    driver: nn.Module, stacks: tuple[Stack, ...], captured: Sequence[Captured]
) -> tuple[type, ...]:
    """What is grafted for these stacks; a graph that is rewired takes the place of source."""
    if captured:
        return (driving_mixin(driver, stacks, captured),)
    return _loops(driver, stacks).mixins


def _inline(captured: Sequence[Captured]) -> set[str]:
    return {path for one in captured for path in one.inline}


def _present(driver: nn.Module) -> tuple[Stack, ...]:
    return cast("tuple[Stack, ...]", driver.__dict__.get(_STACKS, ()))


def _captured(driver: nn.Module) -> tuple[Captured, ...]:
    return cast("tuple[Captured, ...]", driver.__dict__.get(_CAPTURED, ()))


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
    found = segments_of(holder)
    rewired = [name for each in (found.segments() if found else ()) for name in each.members]
    names = dict.fromkeys((*rewired, *planned))
    if any("." in name for name in names):  # of lists inside the holder
        return tuple(names)
    if isinstance(holder, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return tuple(blocks(holder))
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
