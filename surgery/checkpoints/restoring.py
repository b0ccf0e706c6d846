"""``surgery.restore``: the model that ``surgery.save`` wrote, rewrites and all."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery import progress
from surgery.checkpoints import base_weights, generation, manifest, tensorfile
from surgery.checkpoints.inventory import is_dense, places, take
from surgery.checkpoints.manifest import Manifest, TensorEntry
from surgery.checkpoints.placing import fill, tie
from surgery.checkpoints.swap import recover
from surgery.editing import repeat, settle, undo
from surgery.errors import CheckpointError, ModelStateError, SourceError
from surgery.record import Record, record_of, set_record
from surgery.sources import rebuild
from surgery.table import some
from surgery.tree import named_modules, named_parameters
from surgery.untrusted.paths import short

#: What a pass may run into on a model that its edits do not fit.
_MISFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def restore(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    allow_other_base: bool = False,
) -> nn.Module:
    """Rebuild a model that ``surgery.save`` wrote.

    The original weights are not needed. Outputs are bitwise those of the model that was saved,
    and ``surgery.undo`` works on the result as it would have before. Every file is checked
    against its SHA-256 before the model is touched; nothing is ever unpickled.

    Args:
        folder: What ``save`` wrote.
        model: The stock model: one of the user's own class, built as it was before it was
            rewritten, whose weights are replaced; or, for an adapter, the model with the weights
            that the adapter belongs to. Rewritten in place. By default the model is rebuilt from
            its library.
        device: Where the model is put. By default the CPU, or where ``model`` is; on "meta" no
            weight is read.
        allow_other_base: Put an adapter on stock weights other than those it was saved beside.

    Returns:
        The model, with the training flags, ``requires_grad`` flags and dtypes it was saved with.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer format, or does not fit the model.
        ModelStateError: ``model`` was rewritten already.
    """
    path = Path(folder)
    recover(path)
    saved = manifest.read(path)
    record = Record.from_dict(saved.record) if saved.record is not None else Record()
    _check_model(saved, model)
    manifest.check_files(path, saved)
    check_headers(path, saved)
    if saved.base is not None and model is not None and not allow_other_base:
        base_weights.check(saved.base.tensors, take(model).state)
    target = _rebuild(path, saved, device) if model is None else model
    if device is not None:
        target.to(device)
    _rewrite(path, saved, record, target)
    if device is None or torch.device(device).type != "meta":
        _load(path, saved, target)
        if saved.kind == "adapter":
            settle(target)
    _put_back(path, saved, record, target)
    return target


def _check_model(saved: Manifest, model: nn.Module | None) -> None:
    if model is not None and record_of(model) is not None:
        raise ModelStateError(
            "the model was rewritten already, so nothing can be restored onto it",
            hint="pass a model as it was built, or undo the rewrite first",
        )
    if model is None and saved.kind == "adapter":
        raise CheckpointError(
            f"the folder holds an adapter of a {saved.model_class} and not its stock weights",
            hint="load those and pass them: surgery.restore(folder, model=...)",
        )
    if model is None and saved.source is None:
        raise CheckpointError(
            f"the folder does not say how to build its {saved.model_class}",
            hint="build it and pass it: surgery.restore(folder, model=...)",
        )


def _rebuild(path: Path, saved: Manifest, device: str | torch.device | None) -> nn.Module:
    try:
        return rebuild(saved.source or {}, device=device)
    except SourceError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error


def _rewrite(path: Path, saved: Manifest, record: Record, model: nn.Module) -> None:
    """Repeat the edits; leave the model as it was if they, or the saved tensors, do not fit."""
    if saved.kind == "model":
        _check_fit(path, _expected(saved, without=record.added), model)
    try:
        repeat(model, record, values_follow=True)
        _check_fit(path, _expected(saved, without=()), model, partial=saved.kind == "adapter")
    except (*_MISFIT, CheckpointError) as error:
        if record_of(model) is not None:
            undo(model)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: the saved edits do not fit this {type(model).__name__}: {error!r}",
            hint="pass a model built with the same configuration as the one that was saved",
        ) from error


def _expected(saved: Manifest, *, without: Iterable[str]) -> dict[str, TensorEntry]:
    """Every name that a state dict would hold → its tensor, ties included."""
    names = {**{name: name for name in saved.state}, **saved.ties}
    left_out = set(without)
    return {
        name: saved.state[stored]
        for name, stored in names.items()
        if stored in saved.state and left_out.isdisjoint((name, stored))
    }


def _check_fit(
    path: Path, expected: Mapping[str, TensorEntry], model: nn.Module, *, partial: bool = False
) -> None:
    """Raise unless the model's names and shapes are the expected ones.

    Args:
        path: The folder, for the message.
        expected: Names with their saved tensors.
        model: The model.
        partial: Whether the model may have further tensors.
    """
    all_places = dict(places(model))
    present = {name: place.tensor for name, place in all_places.items() if place.persistent}
    missing = [name for name in expected if name not in all_places]
    extra = [] if partial else [name for name in present if name not in expected]
    if missing or extra:
        raise _other_names(path, missing, extra)
    for name, entry in expected.items():
        shape = tuple(all_places[name].tensor.shape)
        if shape != tuple(entry.shape):
            raise CheckpointError(
                f"{path} holds {name} with shape {tuple(entry.shape)}, the model's is {shape}",
                hint="pass a model built with the same configuration as the one that was saved",
            )


def _other_names(path: Path, missing: list[str], extra: list[str]) -> CheckpointError:
    parts: list[str] = []
    if missing:
        parts.append(f"the model has no {some(missing, cut=short)}")
    if extra:
        parts.append(f"the folder has no {some(extra, cut=short)}")
    only_one_way = not (missing and extra)
    numbered = any(part.isdigit() for name in (missing or extra) for part in name.split("."))
    hint = (
        "was it saved with another number of layers?"
        if only_one_way and numbered
        else "pass a model built with the same configuration as the one that was saved"
    )
    return CheckpointError(f"{path} does not fit: {'; '.join(parts)}", hint=hint)


def _load(path: Path, saved: Manifest, model: nn.Module) -> None:
    """Put the saved tensors where they belong, one by one, and tie what was tied."""
    where = dict(places(model))
    sections = {**saved.transient, **saved.state}
    wanted = {name: entry for name, entry in sections.items() if name in where}
    used: set[int] = set()
    total = sum(_nbytes(entry) for entry in wanted.values())
    with progress.task("loading", total, "bytes") as task:
        for name, tensor in tensors_of(path, wanted):
            task.advance(tensor.numel() * tensor.element_size())
            fill(where[name], tensor, used)
            used.add(id(where[name].tensor))
    for alias, name in saved.ties.items():
        if alias in where and name in where:
            tie(where[alias], where[name])


def check_headers(path: Path, saved: Manifest) -> None:
    """Raise unless every file holds the tensors that surgery.json says it does."""
    sections = (saved.state, saved.transient, saved.kept)
    files = {entry.file for section in sections for entry in section.values()}
    contents = {file: tensorfile.contents(path / file) for file in files}
    for section in sections:
        for name, entry in section.items():
            slot = contents[entry.file].get(name)
            if slot is None:
                raise CheckpointError(f"{path / entry.file} does not hold {short(name)}")
            found = (tensorfile.DTYPES[slot.dtype], list(slot.shape))
            if found != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"{path / entry.file} holds {short(name)} as {found[0]} {found[1]}, "
                    f"surgery.json says {short(entry.dtype)} {short(str(entry.shape))}"
                )
            if entry.stride is not None and not is_dense(entry.shape, entry.stride):
                raise CheckpointError(
                    f"surgery.json gives {short(name)} the strides {short(str(entry.stride))}"
                )


def tensors_of(path: Path, entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on the CPU, file by file, laid out as it was saved."""
    by_file: dict[str, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        for name, tensor in tensorfile.read(path / file, names):
            stride = entries[name].stride
            if stride is None:
                yield name, tensor
            else:
                laid_out = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
                yield name, laid_out.copy_(tensor)


def _nbytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * tensorfile.WIDTHS[entry.dtype]


def _put_back(path: Path, saved: Manifest, record: Record, model: nn.Module) -> None:
    """Flags, the edit log with the copies that undo needs, and the generation config."""
    trainable = set(saved.trainable)
    covered = {*saved.state, *saved.ties}
    for name, parameter in named_parameters(model):
        if name in covered:
            parameter.requires_grad_(name in trainable)
    if saved.kind == "adapter":
        return
    otherwise = set(saved.otherwise)
    for name, module in named_modules(model):
        module.training = saved.training != (name in otherwise)
    generation.put_back(model, saved.generation)
    where = dict(places(model))
    for key, tensor in tensors_of(path, saved.kept):
        index, _, name = key.partition("/")
        device = where[name].tensor.device if name in where else torch.device("cpu")
        record.operations[int(index)].kept[name] = tensor.to(device)
    set_record(model, record)
