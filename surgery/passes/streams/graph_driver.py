"""Code that calls blocks in a way that cannot be rewritten: its graph is rewired instead.

The forward of the driver is captured, with its children as leaves, and every call of a block goes
through `Steps`, as in code that `surgery.capture.loops` writes::

    steps = _begin(self.layers)
    layers_0 = steps.run(self.layers[0], x)
    layers_1 = steps.run(self.layers[1], layers_0)

A graph is right for the calls it was captured for: it has guards, and a call they do not accept is
captured anew (`surgery.capture.Forward`). Rewriting the source has no such limits, and comes first.

Where blocks lie in modules below the driver, as in the stages of a ResNet, the forwards of those
are part of the graph. Called by anyone else they would run their blocks without mixing, so they
refuse. A block call under ``torch.utils.checkpoint`` is checkpointed by itself, so that the mixing
stands outside.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import fx, nn

from surgery.capture import Call, Capture, Forward, Trace, capture, capture_blocks
from surgery.capture.beneath import forward_beneath
from surgery.capture.graft import Generated, graft, grafts, stock_class, ungraft
from surgery.capture.loops import Stack, loop_mixins
from surgery.capture.loops.mixins import LoopMixinType
from surgery.errors import CaptureError, ModelStateError
from surgery.passes.streams.capturing import captures, capturing
from surgery.passes.streams.segment import CHILD
from surgery.passes.streams.steps import begin
from surgery.tree import children, named_modules

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


@dataclasses.dataclass(frozen=True)
class Captured:
    """A stack whose driver is captured.

    Attributes:
        driver: Path of the driver in the model.
        container: Path of what holds the blocks, from the driver.
        inline: Paths of the modules whose forwards are part of the graph, from the driver.
        key: Tells the capture from those of other drivers.
    """

    driver: str
    container: str
    inline: tuple[str, ...]
    key: str

    def dump(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**dataclasses.asdict(self), "inline": list(self.inline)}

    def note(self) -> str:
        """For the plan."""
        driver = self.driver or "the model"
        return f"the forward of {driver} is replaced by capture, specialised on its guards"

    @staticmethod
    def load(data: Mapping[str, Any]) -> Captured:
        """Back from ``dump``."""
        return Captured(data["driver"], data["container"], tuple(data["inline"]), data["key"])


@dataclasses.dataclass(frozen=True)
class Rewire:
    """The edit: blocks that a graph calls are called through the runtime.

    Attributes:
        stacks: The blocks, as seen from the driver.
    """

    stacks: tuple[Stack, ...]

    def __call__(self, captured: Capture, module: nn.Module) -> Capture:
        """The same capture with its block calls rewired."""
        return captured.rewritten(_rewired(captured.graph, self._blocks(module)), module)

    def _blocks(self, module: nn.Module) -> dict[str, str]:
        """Path of every block, as a graph names it, → the container it belongs to."""
        first = {id(child): path for path, child in _reversed(named_modules(module))}
        found: dict[str, str] = {}
        for stack in self.stacks:
            for member in stack.members:
                path = _join(stack.container, member)
                found[first[id(module.get_submodule(path))]] = stack.container
        return found


def _reversed(items: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return list(items)[::-1]


# -- the graph ------------------------------------------------------------------------------------


def _rewired(graph: fx.Graph, blocks: Mapping[str, str]) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    steps: dict[str, fx.Node] = {}
    for node in cast("Iterable[fx.Node]", graph.nodes):
        container = blocks.get(str(node.target)) if node.op == "call_module" else None
        if container is None:
            copies[node] = made.node_copy(node, copies.__getitem__)
            continue
        if container not in steps:
            steps[container] = _begun(made, container, node)
        copies[node] = _run(made, steps[container], node, copies)
    return made


def _begun(graph: fx.Graph, container: str, before: fx.Node) -> fx.Node:
    holder = graph.create_node("get_attr", container, name="holder")
    holder.meta = _meta(before)
    node = graph.call_function(begin, (holder,))
    node.meta = _meta(before)
    node.name = node.name.replace("begin", "steps")
    return node


def _run(
    graph: fx.Graph, steps: fx.Node, node: fx.Node, copies: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """``steps.run(block, ...)``, or what checkpoints it, in the place of a call of the block."""
    block = graph.create_node("get_attr", cast("str", node.target), name=f"{node.name}_block")
    block.meta = _meta(node)
    args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
    region = node.meta.get("checkpoint")
    method, options = "run", ()
    if region is not None:
        method, options = "checkpointed", (region.use_reentrant, region.preserve_rng_state)
    given = (steps, block, *options, *cast("tuple[Any, ...]", args))
    made = graph.create_node("call_method", method, given, cast("Any", kwargs), name=node.name)
    # Run once: what it does to the history is not to be repeated. What was one checkpointed
    # region becomes several, with the block between them.
    made.meta = {**node.meta, "mutates": True, "checkpoint": None}
    return made


def _meta(node: fx.Node) -> dict[str, Any]:
    return {
        "owner": node.meta["owner"],
        "where": node.meta["where"],
        "val": None,
        "context": (),
        "checkpoint": None,
    }


# -- who drives -----------------------------------------------------------------------------------


def innermost_driver(trace: Trace, holder: str, calls: Sequence[Call]) -> str:
    """The innermost module that has these blocks, and whose forward leads to all their calls."""
    chains = _chains(trace, calls)
    for driver in chains[0]:
        if all(driver in chain for chain in chains) and _has(driver, holder, calls, chains):
            return driver
    raise AssertionError("every call is made by the model itself, at the root")


def outermost_driver(model: nn.Module, trace: Trace, holder: str, calls: Sequence[Call]) -> str:
    """The outermost module whose code may run a block, or something that leads to one of them.

    Code above the innermost driver may go past it, for instance to checkpoint the blocks one by
    one, so it has to be part of the capture.
    """
    innermost = innermost_driver(trace, holder, calls)
    chains = _chains(trace, calls)
    below = [_join(innermost, path) for path in inlined(trace, innermost, calls)]
    reached = (*below, *(call.path for call in calls))
    above = chains[0][chains[0].index(innermost) + 1 :]
    for path in reversed(above):
        if not _has(path, holder, calls, chains):
            continue
        stacks = _grouped(_below(each, path) for each in reached)
        loops = loop_mixins(stock_class(model.get_submodule(path)), stacks)
        if loops.methods or loops.refused:
            return path
    return innermost


def inlined(trace: Trace, driver: str, calls: Sequence[Call]) -> tuple[str, ...]:
    """Paths, from a driver, of the modules whose forwards lead from it to the blocks."""
    chains = _chains(trace, calls)
    paths = {path for chain in chains for path in chain[: chain.index(driver)]}
    return tuple(sorted(_below(path, driver) for path in paths))


def _has(driver: str, holder: str, calls: Sequence[Call], chains: Sequence[Sequence[str]]) -> bool:
    """Whether a module on all chains has the blocks, their holder, and what leads to them."""
    between = (path for chain in chains for path in chain[: chain.index(driver)])
    return all(_within(p, driver) for p in (holder, *(call.path for call in calls), *between))


def _chains(trace: Trace, calls: Sequence[Call]) -> list[list[str]]:
    callers = {call.path: call.owner for call in reversed(trace.calls)}
    return [_chain(call.owner, callers) for call in calls]


def _grouped(paths: Iterable[str]) -> tuple[Stack, ...]:
    """Modules by what holds them, as the analysis of source wants them."""
    members: dict[str, list[str]] = {}
    for path in paths:
        container, _, name = path.rpartition(".")
        members.setdefault(container, []).append(name)
    return tuple(Stack(path, tuple(dict.fromkeys(names))) for path, names in members.items())


def _chain(owner: str, callers: Mapping[str, str]) -> list[str]:
    """The module whose forward made a call, the one that called that, and so on to the root."""
    chain = [owner]
    while chain[-1]:
        chain.append(callers[chain[-1]])
    return chain


def plan_capture(
    model: nn.Module,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
    *,
    driver: str,
    holder: str,
    members: Sequence[str],
    inline: tuple[str, ...],
) -> Captured:
    """Capture a driver at the call that an example makes of it.

    Args:
        model: The root.
        example: Positional and keyword arguments of the model.
        driver: Path of the driver.
        holder: Path of what holds the blocks.
        members: Paths of the blocks from there.
        inline: Paths of the modules whose forwards become part of the graph, from the driver.

    Raises:
        CaptureError: the driver cannot be captured, or its graph does not call every block.
    """
    module = model.get_submodule(driver)
    container = _below(holder, driver)
    present = driven(module)
    # What an earlier rewrite made part of the forward stays so.
    whole = inline if present is None else drive_of(present).inline
    whole = tuple(sorted({*inline, *whole}))
    first = _captured(_as_written(model, driver), driver, example, whole)
    edit = Rewire((Stack(container, tuple(members)),))
    _check_calls(first, edit, module, driver)
    key = _key(first, module)
    drive_of(driven_class(stock_class(module), key, edit, whole)).add(first, module)
    return Captured(driver, container, inline, key)


def _as_written(model: nn.Module, path: str) -> nn.Module:
    """The model with the module at ``path`` as it was before the code of its class was rewritten.

    Only the modules on the way are new objects; all others, and all tensors, are the model's own.
    """
    name, _, rest = path.partition(".")
    made = object.__new__(type(model))
    made.__dict__.update(model.__dict__)
    if name:
        inner = _as_written(children(model)[name], rest)
        made.__dict__["_modules"] = {**model.__dict__["_modules"], name: inner}
        return made
    made.__class__ = stock_class(model)
    for mixin in reversed(grafts(model)):
        if not _rewrites(mixin):
            graft(made, mixin)
    return made


def _rewrites(mixin: type) -> bool:
    return isinstance(mixin, LoopMixinType) or issubclass(mixin, (Driven, Inlined))


def _captured(
    model: nn.Module,
    path: str,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
    inline: tuple[str, ...],
) -> Capture:
    args, kwargs = example
    with captures(Driven):
        if not path:
            return capture(model, args, kwargs, inline=inline)
        return capture_blocks(model, args, kwargs, paths=[path], inline={path: inline})[path]


def _check_calls(first: Capture, edit: Rewire, driver: nn.Module, path: str) -> None:
    called = {str(node.target) for node in first.graph.nodes if node.op == "call_module"}
    for stack in edit.stacks:
        for member in stack.members:
            block = driver.get_submodule(_join(stack.container, member))
            if not any(driver.get_submodule(target) is block for target in called):
                raise CaptureError(
                    f"the forward of {path or 'the model'} ({stock_class(driver).__name__}) does "
                    f"not call {_join(stack.container, member)} as a module, but its forward or a "
                    "part of it"
                )


def captured_methods(
    cls: type[nn.Module], edit: Rewire, inline: tuple[str, ...]
) -> tuple[str, ...]:
    """The methods of a driver that lead to blocks, ``forward`` first."""
    blocks = [_join(stack.container, name) for stack in edit.stacks for name in stack.members]
    loops = loop_mixins(cls, _grouped([*blocks, *inline]))
    names = {*loops.methods, *loops.refused} - {"forward"}
    plain = sorted(n for n in names if isinstance(inspect.getattr_static(cls, n), _FUNCTION))
    return ("forward", *(name for name in plain if not name.startswith("__")))


_FUNCTION = types.FunctionType


# -- the classes ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Drive:
    """What the mixin of a captured driver is made of.

    Attributes:
        cls: The driver's stock class.
        key: Tells its captures from those of other drivers, the same in every process.
        edit: What is done to them.
        inline: The modules whose forwards are part of them.
        forwards: Name of a method → what it became.
        first: A capture of the forward, unedited; None where nothing was captured beforehand.
    """

    cls: type[nn.Module]
    key: str
    edit: Rewire
    inline: tuple[str, ...]
    forwards: dict[str, Forward]
    first: Capture | None = None

    def add(self, first: Capture, module: nn.Module) -> None:
        """Take on an unedited capture of a driver's forward."""
        self.first = first
        self.forwards["forward"].add(self.edit(first, module))


class Driven(Generated):
    """Base of the mixins of captured drivers; one class for drivers of one source."""

    # One name that no module has: what a class defines hides children of that name.
    _surgery_drive: ClassVar[Drive]

    @classmethod
    def recipe(cls) -> tuple[Any, tuple[Any, ...]]:
        """What `driven_class` makes this class from."""
        drive = cls._surgery_drive
        return driven_class, (drive.cls, drive.key, drive.edit, drive.inline)


def drive_of(mixin: type[Driven]) -> Drive:
    """What a mixin is made of."""
    return mixin._surgery_drive  # pyright: ignore[reportPrivateUsage]


def driven_class(
    cls: type[nn.Module], key: str, edit: Rewire, inline: tuple[str, ...]
) -> type[Driven]:
    """The class of these arguments; a new one captures at its first call."""
    with _lock:
        known = (cls, key, edit, inline)
        if known not in _classes:
            _classes[known] = _make_class(*known)
        return _classes[known]


_lock = threading.Lock()
_classes: dict[tuple[Any, ...], type[Driven]] = {}


def _make_class(
    cls: type[nn.Module], key: str, edit: Rewire, inline: tuple[str, ...]
) -> type[Driven]:
    def stock(name: str) -> Callable[[nn.Module], Callable[..., Any]]:
        return lambda module: _while_capturing(made, _beneath(type(module), made, name))

    forwards = {
        name: Forward(edit=edit, inline=inline, function=stock(name))
        for name in captured_methods(cls, edit, inline)
    }

    def method(name: str) -> Callable[..., Any]:
        shared = forwards[name]

        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if made in capturing():
                return _beneath(type(self), made, name)(self, *args, **kwargs)
            for path in inline:
                _check_no_hooks(self, path)
            return shared(self, *args, **kwargs)

        known = getattr(cls, name)
        run.__name__, run.__doc__ = name, known.__doc__
        # Trainers and pipelines ask a model which inputs it takes.
        run.__dict__["__signature__"] = inspect.signature(known)
        return run

    names = {
        "_surgery_drive": Drive(cls, key, edit, inline, forwards),
        "__module__": __name__,
        **{name: method(name) for name in forwards},
    }
    made = cast("type[Driven]", type("Driven", (Driven,), names))
    return made


def _beneath(cls: type[nn.Module], mixin: type, name: str) -> Callable[..., Any]:
    if name == "forward":
        return forward_beneath(cls, mixin)
    lineage = cls.__mro__
    owner = next(base for base in lineage[lineage.index(mixin) + 1 :] if name in vars(base))
    return vars(owner)[name]


def _while_capturing(made: type, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with captures(made):
            return function(*args, **kwargs)

    return traced


class Inlined(_Module):
    """Put over a module whose forward is part of a driver's graph."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What it was while the driver is captured; an error for anyone else."""
        if not capturing():
            raise CaptureError(
                f"this {type(self).__name__} holds blocks whose shortcuts cross into other "
                "modules, and was called by itself, where they would be left out",
                hint="call the model, or surgery.undo it first",
            )
        return super().forward(*args, **kwargs)


def _check_no_hooks(driver: nn.Module, path: str) -> None:
    module = driver.get_submodule(path)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(module.__dict__[name] for name in hooks):
        raise ModelStateError(
            f"{path} of a rewired {type(driver).__name__} has a hook, which would not run: its "
            "forward became part of the driver's",
            hint="hook its blocks, or what comes before and after it",
        )


def driven(driver: nn.Module) -> type[Driven] | None:
    """The mixin of a driver that was captured; None for any other module."""
    return next((mixin for mixin in grafts(driver) if issubclass(mixin, Driven)), None)


def driving_mixin(
    driver: nn.Module, stacks: tuple[Stack, ...], captured: Sequence[Captured]
) -> type[Driven]:
    """The mixin for a driver with these stacks, some of which need a capture."""
    edit = Rewire(tuple(sorted(stacks, key=lambda stack: stack.container)))
    inline = tuple(sorted({path for one in captured for path in one.inline}))
    key = captured[0].key
    made = driven_class(stock_class(driver), key, edit, inline)
    drive = drive_of(made)
    if drive.first is None:
        others = (drive_of(other) for other in list(_classes.values()))
        keys = {one.key for one in captured}
        alike = (other.first for other in others if other.key in keys and other.inline == inline)
        first = next((each for each in alike if each is not None), None)
        if first is not None:
            drive.add(first, driver)
    return made


def check_not_inlined(module: nn.Module, path: str) -> None:
    """Raise if the forward of a module is part of a captured driver's.

    Raises:
        ModelStateError: it is, so that its code is not what runs.
    """
    if Inlined in grafts(module):
        raise ModelStateError(
            f"the forward of {path} became part of the one of a module above it by an earlier "
            "rewrite, so that its own code does not run",
            hint="undo the earlier rewrite, or name all stacks in one rule",
        )


def close(driver: nn.Module, before: Iterable[str], after: Iterable[str]) -> None:
    """Make the modules at ``after`` refuse calls that are not the driver's, as ``before`` did."""
    for path in set(before) - set(after):
        ungraft(driver.get_submodule(path), Inlined)
    for path in set(after) - set(before):
        graft(driver.get_submodule(path), Inlined)


# -- what two drivers must have in common to share a class ----------------------------------------


def _key(first: Capture, driver: nn.Module) -> str:
    """A digest of the source and of the classes of everything in the driver."""
    digest = hashlib.sha256(first.source.encode())
    for name, value in sorted(first.code.names.items()):
        described = getattr(value, "__qualname__", None) or f"{id(value):x}"
        digest.update(f"\n{name} {getattr(value, '__module__', '')} {described}".encode())
    for path, module in named_modules(driver):
        if CHILD in path.split("."):
            continue
        kind = stock_class(module)
        slots: dict[str, Any] = {**module._parameters, **module._modules}  # pyright: ignore[reportPrivateUsage]
        empty = ",".join(name for name, held in slots.items() if held is None)
        digest.update(f"\n{path} {kind.__module__}.{kind.__qualname__} {empty}".encode())
    return digest.hexdigest()


def code_of(driver: nn.Module) -> dict[str, str]:
    """Name → generated Python of the captured methods of a driver."""
    mixin = driven(driver)
    return {} if mixin is None else sources(mixin)


def sources(mixin: type[Driven]) -> dict[str, str]:
    """Name → generated Python of the methods that a driver's mixin was captured for so far."""
    return {
        name: "\n\n".join(variant.source for variant in forward.variants)
        for name, forward in drive_of(mixin).forwards.items()
        if forward.variants
    }


def _within(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(f"{parent}.")


def _below(path: str, parent: str) -> str:
    return path.removeprefix(parent).removeprefix(".") if parent else path


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
