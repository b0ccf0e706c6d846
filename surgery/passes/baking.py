"""Mirror maps turned into constants: the mapped values in the place of the duals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from surgery.errors import ModelStateError, RuleError
from surgery.passes.base import ApplyContext, PlanContext, passes_of
from surgery.passes.duals import Attachment, attachments, check_carrier, detach, mapped, mirrors_of
from surgery.passes.links import MAPS
from surgery.passes.mirror import Mirror
from surgery.record import Contract, Edit, Record, record_of
from surgery.select import Site
from surgery.tree import children, joined, named_modules, named_parameters, own_parameters

#: Key of what an edit that bakes a map says in its payload.
BAKED = "mirror"


def holding(model: nn.Module) -> set[str]:
    """Every path at or below which a mapped parameter is, those of the parameters included."""
    paths = {id(module): path for path, module in named_modules(model, duplicates=False)}
    found: set[str] = set()
    for attachment in attachments(model):
        for module, name in attachment.members:
            path = joined(paths[id(module)], name)
            while path not in found:
                found.add(path)
                path = path.rpartition(".")[0]
    return found


def propose_baking(
    sites: Sequence[Site], context: PlanContext, keep_base: Literal["memory", "none"]
) -> list[Edit]:
    """One edit for each map that has a parameter at or below a selected site.

    Raises:
        RuleError: a map or a parameter is on the meta device.
    """
    paths = {id(module): path for path, module in named_modules(context.model, duplicates=False)}
    chosen = [site.path for site in sites]
    edits: list[Edit] = []
    for attachment in attachments(context.model):
        places = [(paths[id(module)], name) for module, name in attachment.members]
        if any(_is_below(joined(*place), path) for place in places for path in chosen):
            where = paths[id(attachment.map)]
            edits.append(_edit(attachment, places, where, context, keep_base))
    return edits


def _is_below(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _edit(
    attachment: Attachment,
    places: Sequence[tuple[str, str]],
    where: str,
    context: PlanContext,
    keep_base: str,
) -> Edit:
    if any(tensor.is_meta for tensor in (*attachment.duals(), *attachment.map.parameters())):
        raise RuleError(
            f"{where} is on the meta device, so it has no values to bake in",
            hint="load the weights first",
        )
    names = [joined(*place) for place in places]
    holder, _, key = where.rpartition(".")
    kind = type(attachment.map).__name__
    lasting = " for good" if keep_base == "none" else ""
    return Edit(
        rule=context.rule,
        pass_name="freeze",  # noqa: S106 - the name of a pass
        site=names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}",
        summary=f"{kind} baked into {len(names)} parameter{'s'[: len(names) > 1]}{lasting}",
        adds={},
        uses=dict.fromkeys(names, "extend"),
        contract=Contract("exact"),
        payload={
            BAKED: {
                "holder": holder.removesuffix(MAPS).removesuffix("."),
                "key": key,
                "members": [list(place) for place in places],
            }
        },
        removes=tuple(joined(where, name) for name, _ in named_parameters(attachment.map)),
        reversible=keep_base == "memory",
    )


@torch.no_grad()
def bake(model: nn.Module, edit: Edit, context: ApplyContext) -> None:
    """Write what a map makes of its duals into them, and take the map away."""
    made = edit.payload[BAKED]
    holder = context.module(model, made["holder"])
    going = children(cast("nn.Module", mirrors_of(holder)))[made["key"]]
    attachment = next(each for each in attachments(model) if each.map is going)
    if context.values_follow:
        detach(model, holder, made["key"])
        return
    duals = attachment.duals()
    values = mapped(attachment.map, duals)
    if edit.reversible:
        named = zip((joined(*place) for place in made["members"]), duals, strict=True)
        own = zip(edit.removes, (p for _, p in named_parameters(attachment.map)), strict=True)
        context.kept.update({name: each.detach().clone() for name, each in (*named, *own)})
    detach(model, holder, made["key"])
    for dual, value in zip(duals, values, strict=True):
        dual.data.copy_(value)


def check_unbakeable(model: nn.Module, edit: Edit, context: ApplyContext) -> None:
    """Raise if the map cannot be put back.

    Raises:
        ModelStateError: what was kept is gone, or a module was wrapped since.
    """
    made = edit.payload[BAKED]
    names = [*(joined(*place) for place in made["members"]), *edit.removes]
    missing = [name for name in names if name not in context.kept]
    if missing:
        raise ModelStateError(
            f"no copy of {missing[0]} from before its map was baked in was kept",
            hint="load the model again",
        )
    for path, _ in made["members"]:
        check_carrier(context.module(model, path), path)


@torch.no_grad()
def unbake(model: nn.Module, edit: Edit, context: ApplyContext) -> None:
    """Put a map back as it was, and the duals into their place."""
    made = edit.payload[BAKED]
    maker, original, record = _made_by(model, made)
    again = ApplyContext(0, values_follow=True)
    put = maker.put(model, original, record, again)
    for name, parameter in zip(edit.removes, put.map.parameters(), strict=True):
        parameter.copy_(context.kept.pop(name))
    for path, name in made["members"]:
        dual = own_parameters(context.module(model, path))[name]
        dual.data.copy_(context.kept.pop(joined(path, name)))


def _made_by(model: nn.Module, made: Mapping[str, Any]) -> tuple[Mirror, Edit, Mapping[str, Any]]:
    """The rule that put a map in, its edit, and what that says of the map."""
    for operation in reversed((record_of(model) or Record()).operations):
        passes = passes_of(operation)
        for edit in operation.edits:
            maker = passes[edit.rule]
            for each in _maps(maker, edit):
                if (each["holder"], each["key"]) == (made["holder"], made["key"]):
                    return cast("Mirror", maker), edit, each
    raise ModelStateError(
        f"the edit log does not say how the map of {joined(*made['members'][0])} was made",
        hint="it was removed by other means than surgery.undo",
    )


def _maps(maker: object, edit: Edit) -> Iterable[Mapping[str, Any]]:
    return edit.payload["maps"] if isinstance(maker, Mirror) else ()


def is_baking(edit: Edit) -> bool:
    """Whether an edit of ``freeze`` is about a mirror map."""
    return BAKED in edit.payload
