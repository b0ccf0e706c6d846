"""What was learned turned into constants: shortcuts, and mirror maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from surgery.copies import buffers_put_back, sharing
from surgery.errors import ModelStateError, RuleError, SourceError
from surgery.passes.baking import (
    bake,
    check_unbakeable,
    holding,
    is_baking,
    propose_baking,
    unbake,
)
from surgery.passes.base import ApplyContext, Pass, PlanContext
from surgery.passes.streams import CHILD, Fixed, Segment, all_segments, segments_of
from surgery.record import Contract, Edit, TensorSpec
from surgery.rules import Where, options
from surgery.select import Match, ModelMap, Site
from surgery.tree import children

FROZEN = "frozen"
_NOTHING = "it is no block of a rewired stack and holds nothing that is mapped"


@options
class Freeze(Pass):
    """Contract ``exact`` with ``threshold: 0``, else ``changes``.

    Turns the coefficients of rewired stacks into constants, and bakes mirror maps into the
    parameters that they map, which the model computes with directly from then on. Edges whose
    coefficient is smaller than a threshold are dropped: states that no edge needs any more are not
    kept, and an exported model has the others only. The plan says by how much that changes the
    output of the example.

    Args:
        threshold: Edges with a coefficient of a smaller magnitude are dropped. The coefficient is
            that of the state in the sum that leaves a block, beside what the block itself adds.
        keep_base: Whether the duals and the map are kept in ``memory``, for undo, when a map is
            baked in; ``none`` keeps nothing, and the map is gone for good.
    """

    name: ClassVar[str] = "freeze"

    threshold: Annotated[float, Field(ge=0)] = 0.0
    keep_base: Literal["memory", "none"] = "memory"

    def accepts(self, site: Site) -> Match:
        """Never: what was rewired is known only with the model, see ``chooser``."""
        return Match.no(_NOTHING)

    def chooser(self, sites: ModelMap, where: Where | None) -> Callable[[Site], Match]:
        """Accepts the blocks of stacks that ``shortcuts`` rewired, and what ``mirror`` mapped."""
        rewired = {
            _join(holder, member): segment
            for holder, _, segment in all_segments(sites.model)
            for member in segment.members
        }

        mirrored = holding(sites.model)

        def accepts(site: Site) -> Match:
            if site.path in mirrored:
                return Match.yes("it holds what a mirror map maps")
            segment = rewired.get(site.path) if site.parameter is None else None
            if segment is None:
                return Match.no(_NOTHING)
            if segment.frozen is not None:
                return Match.no("its shortcuts are frozen already")
            return Match.yes("it is a block of a rewired stack")

        return accepts

    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        """One edit per rewired run of blocks, and per map, of which at least one was selected."""
        chosen = {site.path for site in sites}
        found = [
            (holder, number, segment)
            for holder, number, segment in all_segments(context.model)
            if any(_join(holder, member) in chosen for member in segment.members)
        ]
        kept = [_kept(segment, self.threshold) for _, _, segment in found]
        change = self._change(context, found, kept)
        frozen = [
            self._edit(place, support, change, context)
            for place, support in zip(found, kept, strict=True)
        ]
        return [*frozen, *propose_baking(sites, context, self.keep_base)]

    def frozen(
        self, model: nn.Module, edits: Sequence[Edit], spared: AbstractSet[str]
    ) -> Iterable[str]:
        """The coefficients that were learned."""
        for edit in edits:
            yield from self.idles(model, edit)

    def idles(self, model: nn.Module, edit: Edit) -> Iterable[str]:
        """The coefficients that were learned: constants stand in their place."""
        if is_baking(edit):
            return
        prefix, segment = edit.payload["segment"], _segment(model, edit)
        for name, _ in segment.topology.named_parameters():
            yield f"{prefix}.topology.{name}"

    def check_revertible(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Raise if the rewired stack is gone, or a map cannot be put back."""
        if is_baking(edit):
            check_unbakeable(model, edit, context)
            return
        if _segment(model, edit).frozen is None:
            raise ModelStateError(f"{edit.site} is no longer frozen")

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Put the constants beside what they were computed from, or into its place."""
        if is_baking(edit):
            bake(model, edit, context)
            return
        segment = _segment(model, edit)
        support = tuple(tuple(row) for row in edit.payload["support"])
        weights = segment().detach()
        segment.frozen = Fixed(_masked(weights, support), support)
        segment.frozen.train(segment.training)

    def begin(self, model: nn.Module, edit: Edit, context: ApplyContext) -> Edit:
        """Compute the constants again, from coefficients that have their values now."""
        _segment(model, edit).frozen = None
        self.apply(model, edit, context)
        return edit

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Let the coefficients be learned again, from where they are; put a map back."""
        if is_baking(edit):
            unbake(model, edit, context)
            return
        _segment(model, edit).frozen = None

    def baked(self, model: nn.Module, edit: Edit, context: ApplyContext) -> bool:
        """Whether it baked a map in: the parameters alone compute what the model computes then."""
        return is_baking(edit)

    def _edit(
        self,
        place: tuple[str, str, Segment],
        support: tuple[tuple[int, ...], ...],
        change: str,
        context: PlanContext,
    ) -> Edit:
        holder, number, segment = place
        name = _join(holder, f"{CHILD}.{number}")
        edges, left = (sum(map(len, rows)) for rows in (segment.support, support))
        weights = segment()
        dropped = f"; dropping the others changes the output of the example {change}"
        return Edit(
            rule=context.rule,
            pass_name=self.name,
            site=_join(holder, f"{segment.members[0]}..{segment.members[-1]}"),
            summary=f"constants: {left} of {edges} edges kept (threshold {self.threshold:g})",
            adds={
                f"{name}.{FROZEN}.weights": TensorSpec(
                    tuple(weights.shape), str(weights.dtype).removeprefix("torch."), False
                )
            },
            uses={f"the coefficients {name}": "replace"},
            contract=Contract("exact" if left == edges else "changes"),
            payload={"segment": name, "support": [list(row) for row in support]},
            notes=(f"{left} of {edges} edges kept{dropped}",) if left < edges else (),
        )

    def _change(
        self,
        context: PlanContext,
        found: Sequence[tuple[str, str, Segment]],
        kept: Sequence[tuple[tuple[int, ...], ...]],
    ) -> str:
        """How much dropping edges changes the output of the example, for the plan."""
        if all(rows == segment.support for (_, _, segment), rows in zip(found, kept, strict=True)):
            return "not at all"
        try:
            example = context.map.resolved_example
        except SourceError as error:
            return f"by an amount that was not measured ({error.message})"
        if any(tensor.is_meta for tensor in context.model.parameters()):
            return "by an amount that was not measured (the model is on the meta device)"
        copied = sharing(context.model).eval()
        with torch.no_grad(), buffers_put_back(copied):
            before = list(_tensors(copied(*example.args, **example.kwargs)))
            pairs = dict(zip([place[:2] for place in found], kept, strict=True))
            for holder, number, segment in all_segments(copied):
                support = pairs.get((holder, number))
                if support is not None:
                    segment.frozen = Fixed(_masked(segment(), support), support)
            after = list(_tensors(copied(*example.args, **example.kwargs)))
        return f"by {_relative(before, after):.2e} of its norm"


def _kept(segment: Segment, threshold: float) -> tuple[tuple[int, ...], ...]:
    """The support without the edges below the threshold."""
    if any(tensor.is_meta for tensor in segment.parameters()):
        if threshold:
            raise RuleError(
                "the coefficients are on the meta device, so none can be compared with the "
                f"threshold {threshold:g}",
                hint="load the weights first, or use threshold: 0",
            )
        return segment.support
    weights = segment().detach()
    return tuple(
        tuple(j for j in row if abs(float(weights[k, j])) >= threshold)
        for k, row in enumerate(segment.support)
    )


def _masked(weights: Tensor, support: Sequence[Sequence[int]]) -> Tensor:
    """The weights with zero wherever no edge is kept; the weight of a block's own stays."""
    mask = torch.zeros_like(weights, dtype=torch.bool)
    mask[:, len(support) :] = True
    for k, row in enumerate(support):
        mask[k, list(row)] = True
    return torch.where(mask, weights, torch.zeros_like(weights))


def _segment(model: nn.Module, edit: Edit) -> Segment:
    holder, _, number = cast("str", edit.payload["segment"]).rpartition(".")
    path = holder.removesuffix(CHILD).removesuffix(".")
    segments = segments_of(model.get_submodule(path))
    if segments is None or number not in children(segments):
        raise ModelStateError(
            f"{edit.site} no longer has its shortcuts",
            hint="undo the newer rewrite first",
        )
    return cast("Segment", children(segments)[number])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.double() if value.is_floating_point() else value.new_zeros(0)
    elif isinstance(value, dict):
        for item in cast("dict[Any, Any]", value).values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in cast("Sequence[Any]", value):
            yield from _tensors(item)


def _relative(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    apart = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    norm = sum(float(b.square().sum()) for b in before)
    return (apart / norm) ** 0.5 if norm else float("inf")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
