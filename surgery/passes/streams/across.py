"""One history for stacks between which the state changes its shape, such as a ResNet's stages.

Every block is a site, those included that change the shape of the state themselves. Where it
changes, inside a block or between two, stands a cut: the earlier states that are still needed are
projected there, see ``architectures.shortcuts.project``. The history goes past the modules that
hold the stages, so those become part of the captured forward of a module above them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from architectures.shortcuts import History, Topology
from architectures.shortcuts.project import Crossing, Cut, Projection
from surgery.capture import Call, TensorSpec, Trace
from surgery.errors import RuleError
from surgery.passes.streams.ports import Route, Stream
from surgery.passes.streams.runs import Run, comes_of, find_runs, float_leaves, stream_of
from surgery.passes.streams.segment import Segment
from surgery.select import Stack

CUTS = "cuts"
#: An image, whose height and width can be pooled.
_IMAGE = 4


@dataclasses.dataclass(frozen=True)
class CutPlan:
    """A projection to be.

    Attributes:
        site: Index of the site at which the shape changes.
        inside: Whether its block changes it, rather than something before the block.
        before: Number of channels before.
        after: Number of channels after.
        axis: Which axis has the channels: 1 or -1.
        pooled: Whether height and width change.
        dtype: Of the states.
    """

    site: int
    inside: bool
    before: int
    after: int
    axis: int
    pooled: bool
    dtype: str

    def dump(self) -> dict[str, Any]:
        """As JSON-able data."""
        return dataclasses.asdict(self)

    def projection(self, generator: torch.Generator) -> Projection:
        """The module, with weights drawn from ``generator``."""
        return Projection(
            self.before,
            self.after,
            axis=self.axis,
            pooled=self.pooled,
            dtype=cast("torch.dtype", getattr(torch, self.dtype)),
            generator=generator,
        )


@dataclasses.dataclass(frozen=True)
class Chain:
    """Blocks that follow one another, whatever the shape of the state between them.

    Attributes:
        stacks: The stacks that they come from.
        layers: Paths of the blocks, in the order they are called.
        calls: The call of each block in the trace.
        streams: Where each block takes the state in and gives it out.
        shapes: The shapes of the state, in order.
        cuts: Where it changes.
    """

    stacks: tuple[Stack, ...]
    layers: tuple[str, ...]
    calls: tuple[Call, ...]
    streams: tuple[Stream, ...]
    shapes: tuple[str, ...]
    cuts: tuple[CutPlan, ...]

    @property
    def holder(self) -> str:
        """Path of the innermost module that has all the blocks."""
        parents = [path.split(".")[:-1] for path in self.layers]
        common = list(parents[0])
        for parts in parents[1:]:
            same = [a == b for a, b in zip(common, parts, strict=False)]
            common = common[: same.index(False) if False in same else len(same)]
        return ".".join(common)

    @property
    def is_plain(self) -> bool:
        """Whether it is one stack whose state keeps its shape, which needs nothing of this."""
        return not self.cuts and len(self.stacks) == 1


class AcrossSegment(Segment):
    """The coefficients of blocks between which the state changes its shape, and the projections.

    Args:
        topology: Gives the coefficients.
        diagonal: As for `Segment`.
        shown: As for `Segment`.
        members: Paths of the blocks from their holder, in order.
        streams: The one tensor that is the state.
        cuts: Where it changes its shape.
        generator: Gives the projections for the cuts their weights.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        diagonal: float,
        shown: float,
        members: Sequence[str],
        streams: Sequence[Stream],
        cuts: Sequence[CutPlan],
        generator: torch.Generator,
    ) -> None:
        super().__init__(topology, diagonal=diagonal, shown=shown, members=members, streams=streams)
        self.places = tuple(Cut(cut.site, cut.inside) for cut in cuts)
        self.cuts = nn.ModuleList(cut.projection(generator) for cut in cuts)

    def history(self, weights: Tensor) -> History | Crossing:
        """The start of one forward pass."""
        return Crossing(weights, self.edges, self.places, list(self.cuts))

    def draw(self, generator: Callable[[str], torch.Generator]) -> None:
        """Give the projections their first weights.

        Args:
            generator: Gives the generator of a parameter, by its name in this segment.
        """
        for index, projection in enumerate(self.cuts):
            made = generator(f"{CUTS}.{index}.weight")
            cast("Projection", projection).reset_parameters(made)


# -- which blocks follow one another --------------------------------------------------------------


def find_chains(
    trace: Trace, stacks: Sequence[tuple[Stack, Sequence[str]]], model: nn.Module
) -> tuple[list[Chain], dict[str, str]]:
    """The chains that the selected blocks of some stacks make.

    Args:
        trace: The whole model's.
        stacks: Stacks, with the paths of the blocks that were selected.
        model: Says how the arguments of a block are called.

    Returns:
        The chains of two blocks and more, and for every block in none of them the reason.

    Raises:
        RuleError: two stacks are called in turns, or a state cannot be projected.
    """
    left_out: dict[str, str] = {}
    first: dict[str, Call] = {}
    order = {call.path: index for index, call in reversed(list(enumerate(trace.calls)))}
    for call in reversed(trace.calls):
        first[call.path] = call
    rows: list[tuple[Stack, list[Call]]] = []
    for stack, layers in stacks:
        _check_one_stream(stack, find_runs(trace, layers, model).found)
        left_out.update({path: why for path in layers if (why := _why_not(first.get(path)))})
        called = [first[path] for path in layers if path not in left_out]
        if called:
            rows.append((stack, sorted(called, key=lambda call: order[call.path])))
    rows.sort(key=lambda row: order[row[1][0].path])
    _check_turns(rows, order)
    chains: list[Chain] = []
    for links in _linked(rows):
        if len(links) > 1:
            chains.append(_chain(links, model))
        else:
            left_out[links[0].call.path] = "no other block comes right before or after it"
    return chains, left_out


def _why_not(call: Call | None) -> str:
    """Why a block cannot be a site; empty if it can."""
    if call is None:
        return "the example's forward does not call it"
    given = {**float_leaves(call.args), **float_leaves(call.kwargs)}
    made = float_leaves(call.result)
    if not given or not made:
        return "it takes in or gives out no tensor"
    if next(iter(made.values())) in given.values():
        return "it gives back the tensor it was given, changed in place or not at all"
    return ""


@dataclasses.dataclass(frozen=True)
class _Link:
    """A block of a chain: its call, and the nodes of its state by their paths."""

    stack: Stack
    call: Call
    entry: tuple[Route, fx.Node]
    exit: tuple[Route, fx.Node]


def _check_one_stream(stack: Stack, runs: Iterable[Run]) -> None:
    for run in runs:
        if len(run.streams) > 1:
            raise RuleError(
                f"the blocks of {stack} carry {len(run.streams)} streams side by side "
                f"({', '.join(run.shapes)}), and across: project takes stacks with one",
                hint="leave out across:, or name stacks with one stream, with where: {stack: ...}",
            )


def _check_turns(rows: Sequence[tuple[Stack, Sequence[Call]]], order: Mapping[str, int]) -> None:
    for (stack, calls), (following, others) in itertools.pairwise(rows):
        if order[others[0].path] < order[calls[-1].path]:
            raise RuleError(
                f"across: project needs stacks that follow one another, but the blocks of {stack} "
                f"and {following} are called in turns",
                hint="name the stacks that follow one another, with where: {stack: ...}",
            )


def _linked(rows: Sequence[tuple[Stack, Sequence[Call]]]) -> Iterator[list[_Link]]:
    """Blocks in chains: each is given what the one before it made, or what came of that."""
    chain: list[_Link] = []
    for stack, calls in rows:
        for call in calls:
            link = _link(stack, call, chain[-1]) if chain else None
            if link is None and chain:
                yield chain
                chain = []
            chain.append(link or _first_link(stack, call))
    if chain:
        yield chain


def _first_link(stack: Stack, call: Call) -> _Link:
    given = {**float_leaves(call.args), **float_leaves(call.kwargs)}
    made = float_leaves(call.result)
    return _Link(stack, call, next(iter(given.items())), next(iter(made.items())))


def _link(stack: Stack, call: Call, before: _Link) -> _Link | None:
    """The block as the next one of a chain; None if its state is not what came before."""
    given = {**float_leaves(call.args), **float_leaves(call.kwargs)}
    place, made = before.entry[0], next(iter(float_leaves(call.result).items()))
    node = given.get(place)
    if node is None or not comes_of(node, before.exit[1]) or made[0] != before.exit[0]:
        return None
    return _Link(stack, call, (place, node), made)


def _chain(links: Sequence[_Link], model: nn.Module) -> Chain:
    calls = tuple(link.call for link in links)
    cuts = _cuts(links)
    shapes = [_spec(node) for link in links for node in (link.entry[1], link.exit[1])]
    return Chain(
        tuple(dict.fromkeys(link.stack for link in links)),
        tuple(call.path for call in calls),
        calls,
        (stream_of(calls, (links[0].entry[0], links[0].exit[0]), model),),
        tuple(dict.fromkeys(str(spec) for spec in shapes)),
        cuts,
    )


# -- what becomes of the shape --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Change:
    """A change of shape: where, between which blocks, and from what to what."""

    site: int
    inside: bool
    where: str
    before: TensorSpec
    after: TensorSpec

    def __str__(self) -> str:
        return f"{self.where} the state changes from {self.before} to {self.after}"


def _cuts(links: Sequence[_Link]) -> tuple[CutPlan, ...]:
    changes = list(_changes(links))
    if not changes:
        return ()
    axis = _channels(changes)
    return tuple(_cut(change, axis) for change in changes)


def _changes(links: Sequence[_Link]) -> Iterator[_Change]:
    state = _spec(links[0].entry[1])
    for site, link in enumerate(links):
        entry, made = _spec(link.entry[1]), _spec(link.exit[1])
        if entry != state:
            before = links[site - 1].call.path
            yield _Change(site, False, f"between {before} and {link.call.path}", state, entry)
        if made != entry:
            yield _Change(site, True, f"in {link.call.path}", entry, made)
        state = made


def _channels(changes: Sequence[_Change]) -> int:
    """The axis of the channels, the same for all changes.

    Raises:
        RuleError: no reading of the shapes fits, or more than one.
    """
    for change in changes:
        _check_alike(change)
    readings = {1: _first_fits, -1: _last_fits}
    fitting = [axis for axis, fits in readings.items() if all(map(fits, changes))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RuleError(
            f"{changes[0]}, which may be an image with its channels first or with its channels "
            "last",
            hint="use an example whose height and width differ from the number of channels",
        )
    odd = next((c for c in changes if not _first_fits(c) and not _last_fits(c)), changes[0])
    raise RuleError(
        f"{odd}, which is no projection: the channels of a state may change, and its height and "
        "width may shrink by one factor (in an image, of 4 dimensions), but not its number of "
        "tokens",
        hint="select stacks between which the state keeps its tokens, or leave out across:",
    )


def _check_alike(change: _Change) -> None:
    one, other = change.before, change.after
    if len(one.shape) != len(other.shape) or one.shape[:1] != other.shape[:1]:
        raise RuleError(f"{change}, which is no projection: dimensions or the batch differ")
    if one.dtype != other.dtype:
        raise RuleError(f"{change}, which is no projection: the dtype differs")


def _first_fits(change: _Change) -> bool:
    """Whether the change makes sense with the channels first: (batch, channels, height, width)."""
    return len(change.before.shape) == _IMAGE and _shrinks(change, (2, 3))


def _last_fits(change: _Change) -> bool:
    """Whether it makes sense with the channels last: (batch, ..., channels)."""
    rank = len(change.before.shape)
    if rank == _IMAGE:
        return _shrinks(change, (1, 2))
    return change.before.shape[:-1] == change.after.shape[:-1]


def _shrinks(change: _Change, axes: Iterable[int]) -> bool:
    """Whether height and width shrink by about one factor, or stay."""
    pairs = [(change.before.shape[axis], change.after.shape[axis]) for axis in axes]
    if any(after > before for before, after in pairs):
        return False
    return len({round(before / after) for before, after in pairs}) == 1


def _cut(change: _Change, axis: int) -> CutPlan:
    before, after = change.before.shape, change.after.shape
    rest = [list(shape) for shape in (before, after)]
    for shape in rest:
        del shape[axis]
    return CutPlan(
        change.site,
        change.inside,
        before[axis],
        after[axis],
        axis,
        rest[0] != rest[1],
        str(change.after.dtype).removeprefix("torch."),
    )


def _spec(node: fx.Node) -> TensorSpec:
    return cast("TensorSpec", node.meta["val"])
