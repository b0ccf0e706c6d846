"""The layers that one adapter changes, in the terms that other libraries share.

Whatever the method, what it comes down to once trained is a pair of factors beside the original
weight: a method that took its start B₀ A₀ out of the weight changes the original by
``s (B A - B₀ A₀)``, which is ``[B, B₀]`` times ``[A; -A₀]``, a pair of twice the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from architectures.adapters import Adapter, DoRA, Matrix, Method
from surgery.adapters import active, merged, names
from surgery.errors import ExportError
from surgery.passes.base import passes_of
from surgery.passes.hosts import Bank, Place, bank_of
from surgery.passes.lowrank import LowRank
from surgery.passes.payload import places_of
from surgery.record import Edit, Record, record_of
from surgery.registry import ADAPTERS, suggest
from surgery.save_guard import not_baked, to_settle, within_inserted
from surgery.tree import joined, own_parameters


@dataclass(frozen=True)
class Layer:
    """One use of one adapted weight, with the adapter's change of it.

    Attributes:
        place: Where it is.
        module: The module.
        matrix: How the weight is read as a matrix.
        A: (*stack, rank, columns).
        B: (*stack, rows, rank).
        magnitude: Length of each row of the changed weight, (rows,), where the method has one
            (DoRA); else None.
        scaling: Factor of ``B A``.
        alpha: Numerator of the scaling over the rank of these factors.
        rslora: Whether the numerator is over the root of the rank.
        dropout: Probability of dropping an input of the branch while training.
        method: Name of the method.
    """

    place: Place
    module: nn.Module
    matrix: Matrix
    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    scaling: float
    alpha: float
    rslora: bool
    dropout: float
    method: str

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.A.shape[-2]


def site_of(place: Place) -> str:
    """What a rule calls a place: the module, or the parameter of one that is no single layer."""
    return joined(place.path, place.parameter) if place.bare else place.path


def why_not_low_rank(model: nn.Module) -> str | None:
    """Why what was done to a model is no low-rank adapter beside its stock weights; None if it is.

    Args:
        model: A model with or without rewrites; its values are not looked at.
    """
    record = record_of(model)
    if record is None:
        return "it has no adapters; put some in with a lowrank rule"
    other = next(_beside_adapters(model, record), None)
    if other is not None:
        way_out = to_settle(other) if within_inserted(model, record, other) else ""
        return (
            f"rule {other.rule!r} also changed {other.site} ({other.summary}), which an adapter "
            "beside the stock model does not hold" + (f"; {way_out}" if way_out else "")
        )
    if merged(model):
        return "its adapters are merged into the weights; call surgery.adapters.unmerge first"
    return next((reason for edit, made in _edits(record) if (reason := _folding(edit, made))), None)


def _beside_adapters(model: nn.Module, record: Record) -> Iterator[Edit]:
    """The edits that did something else than put adapters in, or bake values into their factors."""
    apart = not_baked(model, record)
    for edit in record.edits:
        of_another = edit.pass_name != LowRank.name
        if of_another and (edit in apart or not within_inserted(model, record, edit)):
            yield edit


def _folding(edit: Edit, made: LowRank) -> str | None:
    method = cast("type[Method]", ADAPTERS.get(made.method))
    if not method.folds_weight:
        return None
    return (
        f"method {made.method!r} adds to the weight of {edit.site} at every step of its training, "
        "so what it learned is of full rank; format='merged' writes the whole model with it"
    )


def the_adapter(model: nn.Module, wanted: str | None) -> tuple[str, float]:
    """The adapter that is meant, and its share in what the model computes.

    Args:
        model: A model with adapters.
        wanted: Its name; None for the one that is active.

    Raises:
        ExportError: there is no such adapter, or none or several are active.
    """
    known = names(model)
    if wanted is not None:
        if wanted not in known:
            raise ExportError(f"there is no adapter {wanted!r}", hint=suggest(wanted, known))
        return wanted, 1.0
    counting = active(model)
    if len(counting) != 1:
        listed = ", ".join(map(repr, counting)) or "none"
        raise ExportError(
            f"of the adapters {', '.join(map(repr, known))} these are active: {listed}; a file "
            "holds one",
            hint="name it, as in adapter='default', and export each to a folder of its own",
        )
    return next(iter(counting.items()))


def layers_of(model: nn.Module, adapter: str, share: float = 1.0) -> list[Layer]:
    """Every use of every weight that an adapter changes, in the order of the edit log.

    Args:
        model: A model for which ``why_not_low_rank`` is None.
        adapter: Name of the adapter.
        share: What its change is multiplied by.

    Raises:
        ExportError: a change is no pair of factors.
    """
    record = cast("Record", record_of(model))
    return [
        layer
        for edit, made in _edits(record)
        if made.adapter == adapter
        for layer in _layers(model, edit, made, share)
    ]


def _edits(record: Record) -> Iterator[tuple[Edit, LowRank]]:
    for operation in record.operations:
        passes = passes_of(operation)
        for edit in operation.edits:
            if edit.pass_name == LowRank.name:
                yield edit, cast("LowRank", passes[edit.rule])


@torch.no_grad()
def _layers(model: nn.Module, edit: Edit, made: LowRank, share: float) -> Iterator[Layer]:
    places = places_of(edit)
    first = model.get_submodule(places[0].path)
    bank = cast("Bank", bank_of(first, places[0].parameter))
    found = bank.adapters[made.adapter]
    A, B = _whole(found)
    scaling = found.scaling * share
    for place in places:
        yield Layer(
            place=place,
            module=model.get_submodule(place.path),
            matrix=bank.matrix,
            A=A,
            B=B,
            magnitude=_magnitude(found, first, place, bank, share),
            scaling=scaling,
            alpha=_alpha(made, scaling, A.shape[-2]),
            rslora=made.scaling == "rslora",
            dropout=found.dropout,
            method=made.method,
        )


def _whole(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """The factors of the change of the original weight."""
    A, B = (factor.detach() for factor in adapter.factors())
    taken = adapter.beginning
    if taken is None:
        return A, B
    A0, B0 = (factor.detach() for factor in taken.factors())
    return torch.cat([A, -A0.to(A)], dim=-2), torch.cat([B, B0.to(B)], dim=-1)


def _magnitude(
    adapter: Adapter, module: nn.Module, place: Place, bank: Bank, share: float
) -> Tensor | None:
    if not adapter.scales_rows:
        return None
    if share != 1.0:
        raise ExportError(
            f"the adapter at {site_of(place)} counts with a share of {share:g}, and scaled rows "
            "(DoRA) have no shares",
            hint="activate it alone: surgery.adapters.activate(model, NAME)",
        )
    if isinstance(adapter, DoRA):
        return adapter.lora_magnitude_vector.detach()
    weight = bank.matrix.fold(own_parameters(module)[place.parameter].detach())
    A, B = adapter.factors()
    length = (weight + adapter.scaling * (B @ A)).square().sum(-1).sqrt()
    return (adapter.gain(weight) * length).detach()


def _alpha(made: LowRank, scaling: float, rank: int) -> float:
    """The numerator that gives back ``scaling``: the rule's own where it is that."""
    spread: Callable[[int], float] = math.sqrt if made.scaling == "rslora" else float
    told = float(made.rank if made.alpha is None else made.alpha)
    for alpha in (told, told * rank / made.rank):
        if alpha / spread(rank) == scaling:
            return alpha
    return scaling * spread(rank)
