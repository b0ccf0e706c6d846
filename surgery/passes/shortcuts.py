"""Residual connections reassigned: the shortcuts of a stack become a matrix, fixed or learned."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import AfterValidator, Field
from torch import nn

from architectures.shortcuts import Start, Topology
from surgery.capture.graft import check_graftable, stock_class
from surgery.errors import ModelStateError, RuleError
from surgery.passes.base import ApplyContext, Pass, PlanContext
from surgery.passes.names import check_name
from surgery.passes.streams import (
    CHILD,
    AcrossSegment,
    BlockPlan,
    Captured,
    Chain,
    CutPlan,
    Run,
    Segment,
    Segments,
    Stream,
    check_released,
    cover,
    drive,
    find_chains,
    find_runs,
    graft_blocks,
    plan_across,
    plan_driver,
    plan_sites,
    planned_code,
    release,
    segments_of,
    uncover,
    ungraft_blocks,
    with_a_state,
)
from surgery.record import Contract, Edit, TensorSpec
from surgery.registry import TOPOLOGIES, suggest
from surgery.residuals import Residual
from surgery.rules import Where, invalid, options
from surgery.select import Match, ModelMap, Site, Stack, stacks_meant
from surgery.table import collapse
from surgery.tree import children, joined, named_modules, own_buffers, own_parameters


def _known_topology(name: str) -> str:
    if name not in TOPOLOGIES.names():
        raise invalid(f"unknown topology {name!r}", hint=suggest(name, TOPOLOGIES.names()))
    return name


@options
class Shortcuts(Pass):
    """Contract ``exact`` with ``init: identity``, else ``changes``.

    Reassigns the residual connections of stacks of blocks (ANCRe, arXiv 2602.09009):
    ``x_{k+1} = block_k(x_k) + Σ_{j≤k} c_kj x_j``, where ``x_j`` is what enters block j. A site is a
    block; the blocks of a stack that are selected have to follow one another. A stack is cut
    where its state changes shape, unless ``across`` says otherwise.

    Args:
        topology: Where the coefficients come from; ``surgery list topologies`` shows the names.
        scope: What a state is: what enters a ``block`` (the authors' choice), or the shortcut of
            every ``residual`` addition.
        mode: Whether the mixture is a term more (``add``, the authors'), or takes the place of
            the shortcut that is there (``replace``).
        init: ``uniform`` (the authors'), which changes a pretrained model; or ``identity`` (not
            the authors'), which starts as no change at all. By default as the topology starts,
            ``uniform`` for ``ancre``.
        temperature: Divides the logits before the softmax.
        normalization: Whether the coefficients ``incoming`` at a block sum to one, or those
            ``outgoing`` from a state.
        parameterization: ``softmax``, or ``constant`` for coefficients that are not learned.
        edges: Of a ``static`` topology: a K x K matrix, or a text such as ``0:2, 2:3``, where
            ``i:j`` adds state i to state j.
        plain_blocks: Allow blocks that have no residual addition of their own.
        across: With ``project``, stacks that follow one another have one matrix, whatever happens
            to the shape of the state between their blocks or in them: the earlier states are
            pooled to the new height and width, and projected to the new number of channels by a
            learned 1x1 convolution (not the authors').
    """

    name: ClassVar[str] = "shortcuts"

    topology: Annotated[str, AfterValidator(_known_topology)] = "ancre"
    scope: Literal["block", "residual"] = "block"
    mode: Literal["add", "replace"] = "add"
    init: Literal["uniform", "identity"] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    normalization: Literal["incoming", "outgoing"] | None = None
    parameterization: Literal["softmax", "constant"] | None = None
    edges: str | tuple[tuple[float, ...], ...] | None = None
    plain_blocks: bool = False
    across: Literal["none", "project"] = "none"

    def accepts(self, site: Site) -> Match:
        """Never: what is a block is known only with its model, see ``chooser``."""
        return Match.no("it is no block of a stack")

    def chooser(self, sites: ModelMap, where: Where | None) -> Callable[[Site], Match]:
        """Accepts the blocks of the stacks that a rule speaks of."""
        layers = sites.index(with_a_state(stacks_meant(sites, where), sites))

        def accepts(site: Site) -> Match:
            found = layers.get(site.path) if site.parameter is None else None
            if found is None:
                known = "it is no block of a stack" if layers else "the model has no such stack"
                return Match.no(known)
            stack, at = found
            return Match.yes(f"it is block {at} of {len(stack)} of {stack}")

        return accepts

    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        """One edit per run of blocks with a state of one shape."""
        chosen = {site.path for site in sites}
        stacks = [
            (stack, layers)
            for stack in context.map.all_stacks
            if (layers := [path for path in stack.layers if path in chosen])
        ]
        for stack, layers in stacks:
            _check_consecutive(stack, layers)
        if self.across == "project":
            return self._propose_across(stacks, context)
        return self._propose_runs(stacks, context, _Numbers(context))

    def _propose_runs(
        self,
        stacks: Sequence[tuple[Stack, list[str]]],
        context: PlanContext,
        numbers: _Numbers,
    ) -> list[Edit]:
        found: list[tuple[Stack, Run]] = []
        left_out: dict[str, str] = {}
        for stack, layers in stacks:
            runs = find_runs(context.map.trace, layers, context.model)
            left_out.update(runs.left_out)
            for run in runs.found:
                if not self.plain_blocks and not any(_residuals_in(run.layers, context.map)):
                    left_out.update(dict.fromkeys(run.layers, _PLAIN))
                    continue
                found.append((stack, run))
        if not found:
            raise _nothing_to_rewire(left_out, context.map)
        return [self._edit(stack, run, context, numbers, left_out) for stack, run in found]

    def _propose_across(
        self, stacks: Sequence[tuple[Stack, list[str]]], context: PlanContext
    ) -> list[Edit]:
        chains, left_out = find_chains(context.map.trace, stacks, context.model)
        if not chains:
            raise _nothing_to_rewire(left_out, context.map)
        numbers = _Numbers(context)
        edits: list[Edit] = []
        for chain in chains:
            if chain.is_plain:
                rows = [(chain.stacks[0], list(chain.layers))]
                edits.extend(self._propose_runs(rows, context, numbers))
            else:
                edits.append(self._edit_across(chain, context, numbers))
        notes = tuple(f"{path} is left out: {why}" for path, why in left_out.items())
        return [dataclasses.replace(edits[0], notes=(*edits[0].notes, *notes)), *edits[1:]]

    def code(self, model: nn.Module, edit: Edit) -> Mapping[str, str]:
        """The rewritten methods of those who call the blocks, and of blocks that are rewired."""
        code = planned_code(model, edit.payload["holder"], edit.payload["members"], _captured(edit))
        alike: dict[str, list[BlockPlan]] = {}
        for plan in _plans(edit):
            alike.setdefault(plan.key, []).append(plan)
        for plans in alike.values():
            name = stock_class(model.get_submodule(plans[0].path)).__name__
            blocks = collapse([plan.path for plan in plans])
            code[f"{name}.forward ({blocks})"] = plans[0].code()
        return code

    def check_revertible(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Raise if the segment is gone or what holds it was wrapped since."""
        holder = context.module(model, edit.payload["holder"])
        check_graftable(holder, edit.payload["holder"] or stock_class(holder).__name__)
        segments = segments_of(holder)
        if segments is None or edit.payload["number"] not in children(segments):
            raise ModelStateError(
                f"{edit.site} no longer has its shortcuts",
                hint="they were removed by other means than surgery.undo",
            )
        check_released(model, edit.payload["holder"])

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Put the coefficients beside the blocks and rewrite the code that calls those."""
        path = edit.payload["holder"]
        holder = context.module(model, path)
        segments = segments_of(holder)
        first = segments is None
        if segments is None:
            segments = Segments()
            segments.train(holder.training)
        segment = self._drawn(edit, context).train(holder.training).to(_device(holder))
        segments.add_module(edit.payload["number"], segment)
        if first:
            cover(holder)
            holder.add_module(CHILD, segments)
        plans = _plans(edit)
        try:
            graft_blocks(model, plans)
            drive(model, path, _captured(edit))
        except BaseException:
            ungraft_blocks(model, plans)
            if _take_out(holder, edit):
                uncover(holder)
            raise

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Take the coefficients out, with the last ones also the rewritten code."""
        path = edit.payload["holder"]
        holder = context.module(model, path)
        ungraft_blocks(model, _plans(edit))
        last = _take_out(holder, edit)
        release(model, path)
        if last:
            uncover(holder)

    # -- planning ------------------------------------------------------------------------------

    def _edit(
        self,
        stack: Stack,
        run: Run,
        context: PlanContext,
        numbers: _Numbers,
        left_out: Mapping[str, str],
    ) -> Edit:
        payload, captured = _planned(context, stack.path, run, plan_driver, numbers)
        if self.scope == "residual":
            plans = plan_sites(run, context.map, self.mode, scaled=self._weighs_sums)
            payload["blocks"] = [plan.dump() for plan in plans]
            payload["sites"] = sum(plan.sites for plan in plans)
        notes = [
            f"{path} is left out: {why}" for path, why in left_out.items() if path in stack.layers
        ]
        if captured is not None:
            notes.append(captured.note())
        return self._made(context, payload, run.layers, run.shapes, notes)

    def _edit_across(self, chain: Chain, context: PlanContext, numbers: _Numbers) -> Edit:
        self._check_across(chain)
        residuals = _residuals_in(chain.layers, context.map)
        if not self.plain_blocks and not any(residuals):
            raise _nothing_to_rewire(dict.fromkeys(chain.layers, _PLAIN), context.map)
        payload, captured = _planned(context, chain.holder, chain, plan_across, numbers)
        payload["cuts"] = [cut.dump() for cut in chain.cuts]
        how = "" if captured is None else f": {captured.note()}"
        notes = [f"one matrix for {len(chain.stacks)} stacks{how}"]
        return self._made(context, payload, chain.layers, chain.shapes, notes)

    def _check_across(self, chain: Chain) -> None:
        if self.scope == "residual":
            raise RuleError(
                "across: project needs scope: block, whose states are what enters a block",
                hint="leave out across:, or use scope: block",
            )
        changing = [cut.site for cut in chain.cuts if cut.inside]
        if self.mode == "replace" and changing:
            raise RuleError(
                f"mode: replace takes the place of a shortcut, but {chain.layers[changing[0]]} "
                "changes the shape of the state and does not hand it on",
                hint="use mode: add, or select stacks between whose blocks only the shape changes",
            )

    def _made(
        self,
        context: PlanContext,
        payload: dict[str, Any],
        layers: Sequence[str],
        shapes: Sequence[str],
        notes: Sequence[str],
    ) -> Edit:
        holder, members = payload["holder"], payload["members"]
        edit = Edit(
            rule=context.rule,
            pass_name=self.name,
            site=f"{joined(holder, members[0])}..{members[-1]}",
            summary=self._summary(payload["sites"], shapes, len(payload.get("cuts", ()))),
            adds={},
            uses={f"the shortcuts of {path}": "replace" for path in layers},
            contract=Contract("exact" if self._start == "identity" else "changes"),
            payload=payload,
            notes=tuple(notes),
        )
        name = joined(holder, CHILD, payload["number"])
        return dataclasses.replace(edit, adds=_specs(name, self._segment(edit)))

    def _summary(self, sites: int, shapes: Sequence[str], cuts: int) -> str:
        state = f"{shapes[0]} to {shapes[-1]}, {cuts} cuts" if cuts else " and ".join(shapes)
        how = f"{self.topology}, {self.scope} {self.mode}, {self._start} start"
        return f"{how}, K={sites}, state {state}"

    def begin(self, model: nn.Module, edit: Edit, context: ApplyContext) -> Edit:
        """Give coefficients on the meta device the values they start with."""
        holder = context.module(model, edit.payload["holder"])
        present = cast("Segments", segments_of(holder)).__dict__["_modules"][edit.payload["number"]]
        where = dict(named_modules(present))
        for path, made in named_modules(self._drawn(edit, context)):
            for name, parameter in own_parameters(made).items():
                wanted = own_parameters(where[path])[name].requires_grad
                where[path].__dict__["_parameters"][name] = parameter.requires_grad_(wanted)
            where[path].__dict__["_buffers"].update(own_buffers(made))
        return edit

    def _drawn(self, edit: Edit, context: ApplyContext) -> Segment:
        """The segment of an edit with its first values, on the CPU."""
        segment = self._segment(edit)
        if isinstance(segment, AcrossSegment):
            name = joined(edit.payload["holder"], CHILD, edit.payload["number"])
            segment.draw(lambda parameter: _seeded(context, f"{name}.{parameter}"))
        return segment

    def _segment(self, edit: Edit) -> Segment:
        payload = edit.payload
        topology = self._topology(payload["sites"])
        diagonal, shown = self._diagonals()
        given: dict[str, Any] = {
            "diagonal": diagonal,
            "shown": shown,
            "members": payload["members"],
            "streams": [Stream.load(stream) for stream in payload["streams"]],
        }
        if "cuts" in payload:
            cuts = [CutPlan(**cut) for cut in payload["cuts"]]
            generator = torch.Generator().manual_seed(0)
            return AcrossSegment(topology, **given, cuts=cuts, generator=generator)
        counts = [plan.sites for plan in _plans(edit)] if "blocks" in payload else None
        return Segment(topology, **given, counts=counts)

    def _diagonals(self) -> tuple[float, float]:
        """What is added to the softmax on the diagonal when mixing, and when shown."""
        if self.mode == "add":
            return 0.0, 0.0
        if self.scope == "residual":
            return (1.0, 0.0) if self._start == "identity" else (0.0, 0.0)
        # What a block returns holds its own input once already.
        return (0.0, 1.0) if self._start == "identity" else (-1.0, 1.0)

    @property
    def _weighs_sums(self) -> bool:
        return cast("type[Topology]", TOPOLOGIES.get(self.topology)).weighs_sums

    @property
    def _start(self) -> Start:
        cls = cast("type[Topology]", TOPOLOGIES.get(self.topology))
        return self.init or cls.inits[0]

    def topology_arguments(self) -> dict[str, Any]:
        """The options that the topology is made with, beside the number of its sites."""
        given = {
            "temperature": self.temperature,
            "normalization": self.normalization,
            "parameterization": self.parameterization,
            "edges": self.edges,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _topology(self, sites: int) -> Topology:
        cls = cast("type[Topology]", TOPOLOGIES.get(self.topology))
        return _built(cls, self.topology, sites, self._start, self.topology_arguments())


class _Numbers:
    """Numbers of new segments: after those that a holder has, or that earlier rules add to it."""

    def __init__(self, context: PlanContext) -> None:
        in_force = [] if context.record is None else context.record.edits
        self._next: dict[str, int] = {}
        for edit in (*in_force, *context.earlier):
            if edit.pass_name == Shortcuts.name:
                holder, number = edit.payload["holder"], int(edit.payload["number"])
                self._next[holder] = max(self._next.get(holder, 0), number + 1)

    def next(self, holder: str) -> str:
        number = self._next.get(holder, 0)
        self._next[holder] = number + 1
        return str(number)


def _planned(
    context: PlanContext,
    holder: str,
    blocks: Run | Chain,
    plan: Callable[..., Captured | None],
    numbers: _Numbers,
) -> tuple[dict[str, Any], Captured | None]:
    """What every edit says of its blocks, and how the code that calls them is captured, if so."""
    module = context.model.get_submodule(holder)
    check_graftable(module, holder or stock_class(module).__name__)
    _check_free(module, holder)
    members = [path.removeprefix(f"{holder}.") for path in blocks.layers]
    example = context.map.resolved_example
    captured = plan(
        context.model,
        context.map.trace,
        (example.args, example.kwargs),
        holder=holder,
        members=members,
        calls=blocks.calls,
    )
    payload: dict[str, Any] = {
        "holder": holder,
        "number": numbers.next(holder),
        "members": members,
        "streams": [stream.dump() for stream in blocks.streams],
        "sites": len(members),
    }
    if captured is not None:
        payload["captured"] = captured.dump()
    return payload, captured


def _take_out(holder: nn.Module, edit: Edit) -> bool:
    """Remove a segment from its holder; True if it was the last one."""
    segments = cast("Segments", segments_of(holder))
    del segments.__dict__["_modules"][edit.payload["number"]]
    if children(segments):
        return False
    del holder.__dict__["_modules"][CHILD]
    return True


def _built(
    cls: type[Topology], name: str, sites: int, init: Start, chosen: Mapping[str, Any]
) -> Topology:
    surplus = [option for option in chosen if option not in cls.options]
    if surplus:
        takes = ", ".join(sorted(cls.options)) or "none"
        raise RuleError(f"topology {name!r} has no option {surplus[0]!r}; its options are {takes}")
    try:
        return cls(sites, init=init, **chosen)
    except ValueError as error:
        raise RuleError(f"topology {name!r} on a stack of {sites}: {error}") from None


def _captured(edit: Edit) -> Captured | None:
    found = edit.payload.get("captured")
    return None if found is None else Captured.load(found)


def _plans(edit: Edit) -> list[BlockPlan]:
    return [BlockPlan.load(block) for block in edit.payload.get("blocks", ())]


def _check_consecutive(stack: Stack, layers: Sequence[str]) -> None:
    first = stack.layers.index(layers[0])
    if tuple(layers) != stack.layers[first : first + len(layers)]:
        raise RuleError(
            f"the blocks of {stack} that the rule selects do not follow one another",
            hint="select a run of blocks, such as layers: '-8:'",
        )


def _residuals_in(layers: Sequence[str], sites: ModelMap) -> list[list[Residual]]:
    """The residual additions inside each of some blocks, in the order they are made."""
    found: dict[str, list[Residual]] = {path: [] for path in layers}
    for residual in sites.residuals.residuals:
        path = residual.owner
        while path and path not in found:
            path = path.rpartition(".")[0]
        if path:
            found[path].append(residual)
    return list(found.values())


def _nothing_to_rewire(left_out: Mapping[str, str], sites: ModelMap) -> RuleError:
    grouped: dict[tuple[str, str], str] = {}
    for path, why in left_out.items():
        alike = (re.sub(r"\d+", "#", path), re.sub(r"\d+", "#", why))
        grouped.setdefault(alike, f"    {path}: {why}")
    count = len(sites.residuals.residuals)
    has = "the model has no residual addition" if not count else "nothing can be rewired here"
    return RuleError(
        f"{has}: of the selected blocks no two in a row keep the shape of their state and have "
        "shortcuts to reassign\n" + "\n".join(list(grouped.values())[:8]),
        hint="surgery.inspect(model) lists stacks and residual additions; plain_blocks: true "
        "adds shortcuts to blocks that have none",
    )


_PLAIN = "it has no residual addition of its own"


def _check_free(holder: nn.Module, path: str) -> None:
    """Raise if the name that the coefficients need is taken."""
    if segments_of(holder) is None:
        check_name(holder, path, CHILD, what="the coefficients", leave_out="its blocks")


def _specs(prefix: str, segment: Segment) -> dict[str, TensorSpec]:
    """The tensors a segment brings along, by their full names."""
    trainable = dict(segment.named_parameters())
    return {
        f"{prefix}.{name}": TensorSpec(
            tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), name in trainable
        )
        for name, tensor in cast("dict[str, torch.Tensor]", segment.state_dict()).items()
    }


def _seeded(context: ApplyContext, name: str) -> torch.Generator:
    with context.generator(name) as generator:
        return generator


def _device(holder: nn.Module) -> torch.device:
    """Where the blocks are: that of their first tensor."""
    tensors = (*holder.parameters(), *holder.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
