"""Warn when a rule reaches most layers of a stack but not all, and nothing says it should."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.select.match import Match
from surgery.select.model_map import ModelMap
from surgery.select.sites import Site
from surgery.select.stacks import Stack
from surgery.table import some

# Selectors by which a person names layers on purpose.
_DELIBERATE = frozenset({"path", "layers", "stack", "created_by", "except", "not"})


@dataclass
class _Place:
    """One place within the layers of a stack, such as ``self_attn.q_proj``."""

    sites: dict[int, Site] = field(default_factory=dict[int, Site])
    matched: set[int] = field(default_factory=set[int])


def warn_of_partial(
    sites: ModelMap, candidates: Iterable[Site], considered: Mapping[str, Match]
) -> tuple[str, ...]:
    """A warning for each place that is matched in most layers of a stack, naming the others.

    A place missed because of ``path``, ``layers``, ``stack`` or ``except`` was left out on
    purpose. A layer that lacks the place counts only if nothing else in it was matched.
    """
    stacks: dict[Stack, dict[str, _Place]] = {}
    for site in candidates:
        found = sites.position(site)
        if found is None:
            continue
        stack, layer = found
        name = site.path.removeprefix(stack.layers[layer]).removeprefix(".")
        place = stacks.setdefault(stack, {}).setdefault(name, _Place())
        place.sites[layer] = site
        if considered[site.path].ok:
            place.matched.add(layer)
    return tuple(
        warning
        for stack, places in stacks.items()
        for warning in _warn_of_stack(stack, places, considered)
    )


def _warn_of_stack(
    stack: Stack, places: Mapping[str, _Place], considered: Mapping[str, Match]
) -> Iterable[str]:
    reached = set[int]().union(*(place.matched for place in places.values()))
    grouped: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for name, place in places.items():
        if 2 * len(place.matched) <= len(stack):
            continue
        for reason, layers in _missed(stack, place, reached, considered).items():
            grouped.setdefault((tuple(layers), reason), []).append(name)
    for (layers, reason), names in grouped.items():
        among = places[names[0]].matched
        listed = some((name or "the layer itself" for name in names), 4)
        yield (
            f"{stack}: {listed} matched in {len(among)} of {len(stack)} layers; "
            f"not in {_layers(layers)}: {reason}"
        )


def _missed(
    stack: Stack, place: _Place, reached: set[int], considered: Mapping[str, Match]
) -> dict[str, list[int]]:
    """Reason → the layers a place was missed in for that reason, the deliberate ones left out."""
    missed: dict[str, list[int]] = {}
    for layer in range(len(stack)):
        if layer in place.matched:
            continue
        site = place.sites.get(layer)
        if site is None:
            if layer not in reached:
                missed.setdefault("there is no such module", []).append(layer)
            continue
        answer = considered[site.path]
        if answer.key not in _DELIBERATE:
            missed.setdefault(answer.reason, []).append(layer)
    return missed


def _layers(layers: Sequence[int]) -> str:
    """``layer 3``, or ``layers 3-7, 20``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {shown}"
