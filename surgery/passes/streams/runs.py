"""Which blocks of a stack follow one another, and what flows from each to the next.

Read off a trace: a stream leaves one block as part of its result and enters the next as an
argument, with the same shape and dtype. Where a block changes the shape of the state the stack
is cut.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import fx, nn

from surgery.capture import Call, TensorSpec, Trace
from surgery.capture.graft import stock_class
from surgery.passes.streams.ports import Route, Stream

#: (argument path, result path): a tensor a block takes in, and the one of its kind it gives out.
_Pair = tuple[Route, Route]


@dataclasses.dataclass(frozen=True)
class Run:
    """Blocks that follow one another with a state of one shape.

    Attributes:
        layers: Paths of the blocks, in the order they are called.
        owner: Path of the module whose forward calls them.
        streams: The tensors that make up the state.
        shapes: The shape and dtype of each stream, in the example.
        calls: The call of each block in the trace.
    """

    layers: tuple[str, ...]
    owner: str
    streams: tuple[Stream, ...]
    shapes: tuple[str, ...]
    calls: tuple[Call, ...] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.layers)


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of a stack, and why blocks are in none.

    Attributes:
        found: Runs of at least two blocks, in order.
        left_out: Path of a block → why it is in no run.
    """

    found: tuple[Run, ...]
    left_out: Mapping[str, str]


def find_runs(trace: Trace, layers: Sequence[str], model: nn.Module) -> Runs:
    """The runs among some layers of a stack.

    Args:
        trace: The whole model's.
        layers: Paths of the layers, in order.
        model: Says how the arguments of a layer are called.
    """
    left_out: dict[str, str] = {}
    calls = _first_round(trace, layers, left_out)
    found: list[Run] = []
    for part in _cut(calls, left_out):
        if len(part.calls) > 1:
            found.append(part.run(model))
        else:
            left_out.setdefault(part.calls[0].path, "no other block beside it has this state")
    return Runs(tuple(found), left_out)


def _first_round(trace: Trace, layers: Sequence[str], left_out: dict[str, str]) -> list[Call]:
    """The calls of the layers in the order they are made, of the first time around."""
    if len(layers) == 1 and (again := _repeated(trace, layers[0])):
        return again
    order = {path: index for index, path in enumerate(layers)}
    rounds: list[list[Call]] = []
    for call in trace.calls:
        if call.path not in order:
            continue
        if not rounds or order[call.path] <= order[rounds[-1][-1].path]:
            rounds.append([])
        rounds[-1].append(call)
    longest = max(rounds, key=len) if rounds else []
    called = {call.path for call in longest}
    for path in layers:
        if path not in called:
            ever = any(call.path == path for each in rounds for call in each)
            left_out[path] = (
                "it is called out of the order of its stack"
                if ever
                else "the example's forward does not call it"
            )
    return longest


def _repeated(trace: Trace, path: str) -> list[Call]:
    """The calls of a block that one forward calls again and again (ALBERT); else the first one.

    A history lives as long as that forward, so the calls of several forwards are not one run.
    """
    calls = [call for call in trace.calls if call.path == path]
    owners = {call.owner for call in calls}
    forwards = [call for call in trace.calls if call.path in owners]
    return calls if len(owners) == 1 and len(forwards) <= 1 else calls[:1]


@dataclasses.dataclass
class _Part:
    """A run that is being collected."""

    calls: list[Call]
    pairs: list[_Pair]
    specs: dict[_Pair, TensorSpec]

    def run(self, model: nn.Module) -> Run:
        streams = tuple(stream_of(self.calls, pair, model) for pair in self.pairs)
        shapes = tuple(str(self.specs[pair]) for pair in self.pairs)
        layers = tuple(call.path for call in self.calls)
        return Run(layers, self.calls[0].owner, streams, shapes, tuple(self.calls))


def _cut(calls: Sequence[Call], left_out: dict[str, str]) -> Iterator[_Part]:
    part: _Part | None = None
    for call in calls:
        kept = _kept(call)
        if part is not None:
            pairs = _continued(part, call, kept)
            if pairs:
                part.pairs = pairs
                part.calls.append(call)
                continue
            yield _settled(part)
        part = None
        if kept:
            part = _Part([call], list(kept), kept)
        else:
            left_out[call.path] = _why_not_kept(call)
    if part is not None:
        yield _settled(part)


def _settled(part: _Part) -> _Part:
    """Each argument and each part of the result belongs to one stream; the first one has it."""
    inputs: set[Route] = set()
    outputs: set[Route] = set()
    pairs: list[_Pair] = []
    for pair in part.pairs:
        if pair[0] not in inputs and pair[1] not in outputs:
            inputs.add(pair[0])
            outputs.add(pair[1])
            pairs.append(pair)
    part.pairs = pairs
    return part


def _kept(call: Call) -> dict[_Pair, TensorSpec]:
    """What a block may pass on: a tensor in and another out, alike in shape and dtype."""
    given = {**_leaves(call.args), **_leaves(call.kwargs)}
    made = _leaves(call.result)
    found: dict[_Pair, TensorSpec] = {}
    for place, node in given.items():
        for part, result in made.items():
            spec = _spec(node)
            if spec is not None and result is not node and _spec(result) == spec:
                found[place, part] = spec
    return found


def _continued(part: _Part, call: Call, kept: Mapping[_Pair, TensorSpec]) -> list[_Pair]:
    """The streams of a run that go on through the next block; none if it is cut there."""
    before = part.calls[-1]
    if call.owner != part.calls[0].owner:
        return []
    given = {**_leaves(call.args), **_leaves(call.kwargs)}
    gone = _leaves(before.result)
    goes_on: list[_Pair] = []
    for pair in part.pairs:
        node, last = given.get(pair[0]), gone.get(pair[1])
        same = node is not None and _spec(node) == part.specs[pair]
        if same and last is not None and node is last:
            goes_on.append(pair)
    if not goes_on:
        goes_on = _indirect(part, given, gone)
    # A stream may end before its stack does: the last block of SD3 does not give it out, that of
    # Mochi gives it out as it came.
    made = _leaves(call.result)
    on = [pair for pair in goes_on if pair in kept]
    ended = [pair for pair in goes_on if made.get(pair[1]) in (None, given[pair[0]])]
    return [pair for pair in goes_on if pair in on or pair in ended] if on else []


def _indirect(
    part: _Part, given: Mapping[Route, fx.Node], gone: Mapping[Route, fx.Node]
) -> list[_Pair]:
    """The first stream that the parent works on between two blocks (adds to, attends over)."""
    for pair in part.pairs:
        node, last = given.get(pair[0]), gone.get(pair[1])
        if node is None or last is None or _spec(node) != part.specs[pair]:
            continue
        if _descends(node, last):
            return [pair]
    return []


def _descends(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether ``ancestor`` reaches ``node`` through tensors; nodes stand in their order."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        here = waiting.pop()
        if here is ancestor:
            return True
        if here in seen or here < ancestor:
            continue
        seen.add(here)
        waiting.extend(one for one in here.all_input_nodes if _spec(one) is not None)
    return False


def _why_not_kept(call: Call) -> str:
    given = _specs(_leaves(call.args).values(), _leaves(call.kwargs).values())
    made = _specs(_leaves(call.result).values())
    if not given or not made:
        return "it takes in or gives out no tensor"
    if made[0] in given:
        return "it gives back the tensor it was given, changed in place or not at all"
    return f"it changes the shape of the state: {given[0]} in, {made[0]} out"


def _specs(*groups: Iterable[fx.Node]) -> list[TensorSpec]:
    return [spec for group in groups for node in group if (spec := _spec(node)) is not None]


def _spec(node: fx.Node) -> TensorSpec | None:
    """Shape and dtype of a floating-point tensor; None for anything else."""
    value = node.meta.get("val")
    if isinstance(value, TensorSpec) and value.dtype.is_floating_point:
        return value
    return None


def _leaves(value: Any) -> dict[Route, fx.Node]:
    """The nodes in a nested value, by path; arguments have their position or name first."""
    if isinstance(value, fx.Node):
        return {(): value}
    if isinstance(value, Mapping):
        items = list(cast("Mapping[str, Any]", value).items())
    elif isinstance(value, tuple):
        items = list(enumerate(cast("tuple[Any, ...]", value)))
    else:
        return {}
    return {(at, *path): node for at, item in items for path, node in _leaves(item).items()}


def float_leaves(value: Any) -> dict[Route, fx.Node]:
    """The floating-point tensors among the arguments or in the result of a call, by path."""
    return {path: node for path, node in _leaves(value).items() if _spec(node) is not None}


def comes_of(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether ``ancestor`` reaches ``node`` through floating-point tensors."""
    return _descends(node, ancestor)


def stream_of(calls: Sequence[Call], pair: _Pair, model: nn.Module) -> Stream:
    """The stream of a pair, by position as well as by name: call sites differ."""
    (first, *inner), result = pair
    names = _parameters(model.get_submodule(calls[0].path))
    if isinstance(first, int):
        name = names[first] if first < len(names) else None
        return Stream(first, name, tuple(inner), result)
    position = names.index(first) if first in names else None
    return Stream(position, first, tuple(inner), result)


def _parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that a module's forward takes by position, up to the first ``*``."""
    names: list[str] = []
    forward = inspect.signature(stock_class(module).forward)
    for parameter in list(forward.parameters.values())[1:]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        names.append(parameter.name)
    return names
