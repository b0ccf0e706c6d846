"""Adapters from a folder as changes of stock weights, found with a model on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery import progress
from surgery.checkpoints import manifest
from surgery.checkpoints.base_weights import digest_of
from surgery.checkpoints.inventory import places, take
from surgery.checkpoints.placing import like
from surgery.checkpoints.restoring import check_headers, tensors_of
from surgery.conversion.changes import Merge
from surgery.conversion.stock import Changes
from surgery.editing import repeat
from surgery.errors import CheckpointError, ModelStateError
from surgery.interchange import loading
from surgery.interchange.folder import CONFIG
from surgery.passes.hosts import bank_of
from surgery.passes.lowrank import LowRank
from surgery.passes.payload import places_of
from surgery.record import Record, record_of
from surgery.tree import joined, named_modules, own_parameters

#: First name of a stock tensor → its values as the checkpoint has them.
Read = Callable[[str], Tensor]


def changes_of(
    model: nn.Module,
    folder: Path,
    read: Read,
    *,
    allow_other_base: bool,
    dtype: torch.dtype | None = None,
) -> Changes:
    """What merging an adapter changes.

    Args:
        model: The stock model, its parameters on the meta device; adapters are put into it.
        folder: An adapter of PEFT or diffusers, or one that ``surgery.save`` wrote alone.
        read: Reads a stock tensor.
        allow_other_base: Take an adapter that was saved beside other stock weights.
        dtype: Another dtype that floating stock weights may have had beside the adapter.

    Raises:
        CheckpointError: it is no adapter, is damaged, belongs to another model, or cannot be
            merged.
    """
    if (folder / manifest.NAME).is_file() and not (folder / CONFIG).is_file():
        return _of_surgery(model, folder, read, allow_other_base=allow_other_base, dtype=dtype)
    return _of_others(model, folder, read)


def _of_others(model: nn.Module, folder: Path, read: Read) -> Changes:
    prepared = loading.prepare(model, folder)
    source = prepared.source
    if source.config.splits:
        raise CheckpointError(
            f"{source.where} starts from a decomposition of the weights ({source.config.method}) "
            "that it does not hold, so it cannot be merged row by row",
            hint="convert it to LoRA with PEFT (path_initial_model_for_weight_conversion), or load "
            "the model, surgery.load_adapter, and export it with format='merged'",
        )
    first = take(model).ties
    for name, tensor in source.base.items():
        if not torch.equal(read(first.get(name, name)).to(tensor.dtype), tensor):
            raise CheckpointError(
                f"{source.where} holds another base weight for {name} than the checkpoint's",
                hint="give the checkpoint that the adapter was trained beside",
            )
    prepared.plan.apply()
    _fill(model, prepared.values)
    merges = _merges(model, settling=False)
    return Changes(merges, {first.get(n, n): tensor for n, tensor in source.stock.items()})


def _of_surgery(
    model: nn.Module,
    folder: Path,
    read: Read,
    *,
    allow_other_base: bool,
    dtype: torch.dtype | None,
) -> Changes:
    saved = manifest.read(folder)
    if saved.kind != "adapter" or saved.base is None:
        raise CheckpointError(
            f"{folder} holds a whole model, expected an adapter",
            hint="surgery.restore(folder), then export it with format='merged'",
        )
    manifest.check_files(folder, saved)
    check_headers(folder, saved)
    record = Record.from_dict(saved.record or {})
    foreign = next((edit for edit in record.edits if edit.pass_name != LowRank.name), None)
    if foreign is not None:
        raise CheckpointError(
            f"{folder}: rule {foreign.rule!r} changed {foreign.site} ({foreign.summary}), which no "
            "stock weight can express",
            hint="convert with its recipe instead of merging it",
        )
    if not allow_other_base:
        _check_base(folder, saved.base.tensors, model, read, dtype)
    repeat(model, record, values_follow=True)
    _fill(model, dict(tensors_of(folder, saved.state)))
    return Changes(_merges(model, settling=True))


def _check_base(
    folder: Path,
    base: Mapping[str, str],
    model: nn.Module,
    read: Read,
    dtype: torch.dtype | None,
) -> None:
    state = take(model).state
    odd = next(iter(state.keys() ^ base.keys()), None)
    if odd is not None:
        side = "lacks" if odd in state else "knows"
        raise CheckpointError(f"{folder} belongs to another model: it {side} {odd}")
    for name in progress.track(base, "hashing stock weights"):
        held = state[name].dtype
        beside = {held, dtype} if dtype is not None and held.is_floating_point else {held}
        stored = read(name)
        if all(digest_of(stored.to(each)) != base[name] for each in beside):
            raise CheckpointError(
                f"the adapter in {folder} was saved beside other values, or another dtype, of "
                f"{name}",
                hint="give the checkpoint it was trained beside, or allow_other_base=True",
            )


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    where = dict(places(model))
    for name, value in values.items():
        present = where[name].tensor
        # Never a narrower dtype than the file's: a merge rounds once, at its end.
        wide = torch.promote_types(present.dtype, value.dtype)
        where[name].put(like(present, value.to(wide)))


def _merges(model: nn.Module, *, settling: bool) -> dict[str, Merge]:
    """Name of each adapted weight → what the active adapters make of it."""
    first = take(model).ties
    record = record_of(model) or Record()
    modules = dict(named_modules(model))
    found: dict[str, Merge] = {}
    for edit in record.edits:
        place = places_of(edit)[0]
        module = modules[place.path]
        bank = bank_of(module, place.parameter)
        name = joined(place.path, place.parameter)
        if bank is None or place.parameter not in own_parameters(module):
            raise ModelStateError(f"{name} is computed by a parametrization, and cannot be merged")
        start = [each for adapter in bank.adapters.values() for each in adapter.methods]
        begun = [method for method in start if method.beginning is not None] if settling else []
        adding = bank.contributions(bank.active)
        beside = own_parameters(module)[place.parameter].dtype
        found[first.get(name, name)] = Merge(bank.matrix, tuple(adding), tuple(begun), beside)
    return found
