"""The tensors of a folder under the names of the model they belong to, whatever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.checkpoints import manifest
from surgery.checkpoints.manifest import FileEntry, Manifest, TensorEntry
from surgery.checkpoints.names import keymap
from surgery.checkpoints.restoring import check_headers, tensors_of
from surgery.checkpoints.sharded import SUFFIX, Checkpoint, open_checkpoint
from surgery.errors import CheckpointError
from surgery.exporting import provenance
from surgery.exporting.provenance import File, Provenance
from surgery.record import Record, TensorSpec
from surgery.sources.links import Link

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Side:
    """What one folder, or file, holds.

    Attributes:
        path: Where it is.
        files: Name → size and SHA-256 of each file as it says they were written; None for a
            checkpoint that says nothing of itself.
        description: How the stock model is rebuilt; None if that is not known.
        options: The options of the export it is.
        record: The edit log of a saved model.
        added: Name of what rewrites added → id of the rule.
        specs: Name → what the edit log says it looks like.
        origin: The files that it says it was made of.
        saved: Of a folder of ``surgery.save``.
        checkpoint: Of a folder of safetensors in a library's layout.
        hashes: SHA-256 of each tensor, where the tensors themselves cannot be read.
        ties: Further names → first names, of ``hashes`` and of a saved model.
    """

    path: Path
    files: Mapping[str, FileEntry | File] | None
    description: dict[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    record: Record = field(default_factory=Record)
    added: Mapping[str, str] = field(default_factory=dict[str, str])
    specs: Mapping[str, TensorSpec] = field(default_factory=dict[str, TensorSpec])
    origin: Mapping[str, FileEntry | File] = field(default_factory=dict[str, Any])
    saved: Manifest | None = None
    checkpoint: Checkpoint | None = None
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    ties: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Tensors:
    """The tensors of a side by the model's names; each is read when it is asked for.

    Attributes:
        stock: Name → how to read it; what rewrites added too.
        kept: Copies of stock tensors for undo, as ``<operation>/<name>``.
        transient: Buffers that no state dict holds.
        ties: Further names → first names.
        whole: Whether it holds the stock model, and not only what was added to it.
    """

    stock: Mapping[str, Read]
    kept: Mapping[str, Read] = field(default_factory=dict[str, Read])
    transient: Mapping[str, Read] = field(default_factory=dict[str, Read])
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
    whole: bool = True


def open_side(path: Path) -> Side:
    """Read what a folder or file says of itself; no weight is read.

    Raises:
        CheckpointError: it is no checkpoint, or damaged.
        ExportError: it is an export whose provenance is missing or was changed.
    """
    if path.is_file():
        return _export(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist, expected a folder or an exported file")
    if not (path / manifest.NAME).is_file():
        return Side(path, None, checkpoint=open_checkpoint(path))
    return _export(path) if provenance.is_export(path) else _saved(path)


def tensors_by_name(side: Side, model: nn.Module | None) -> Tensors:
    """The tensors of a side under the names of a model.

    Args:
        side: The side.
        model: The stock model on the meta device, which tells what the keys of a library's
            checkpoint become; without one, keys are names.
    """
    if side.saved is not None:
        return _of_saved(side.path, side.saved)
    if side.checkpoint is not None:
        return _of_checkpoint(side.checkpoint, model)
    return Tensors({}, ties=side.ties)


def _saved(folder: Path) -> Side:
    saved = manifest.read(folder)
    record = Record() if saved.record is None else Record.from_dict(saved.record)
    return Side(
        folder,
        saved.files,
        description=saved.source,
        record=record,
        added=record.added,
        specs={name: spec for edit in record.edits for name, spec in edit.adds.items()},
        origin=saved.origin or {},
        saved=saved,
        ties=saved.ties,
    )


def _export(place: Path) -> Side:
    told: Provenance = provenance.read(place)
    readable = place.is_dir() and any(name.endswith(SUFFIX) for name in told.files)
    return Side(
        place,
        told.files,
        description=told.source,
        options=told.options,
        added=told.added,
        origin=told.origin,
        checkpoint=open_checkpoint(place) if readable else None,
        hashes={} if readable else told.tensors,
        ties=told.ties,
    )


def _of_saved(folder: Path, saved: Manifest) -> Tensors:
    check_headers(folder, saved)

    def readers(section: Mapping[str, TensorEntry]) -> dict[str, Read]:
        return {name: partial(_one, folder, name, entry) for name, entry in section.items()}

    return Tensors(
        readers(saved.state),
        readers(saved.kept),
        readers(saved.transient),
        saved.ties,
        whole=saved.kind == "model",
    )


def _one(folder: Path, name: str, entry: TensorEntry) -> Tensor:
    return next(tensor for _, tensor in tensors_of(folder, {name: entry}))


def _of_checkpoint(checkpoint: Checkpoint, model: nn.Module | None) -> Tensors:
    if model is None:
        return Tensors({key: partial(checkpoint.read, key) for key in checkpoint.tensors})
    names = keymap(model, checkpoint)
    reader = _Linked(checkpoint)
    found: dict[str, Read] = {}
    for link in names.links:
        for name in link.names:
            # A second key of a tied tensor has to be accounted for as well.
            at = name if names.first(name) in found else names.first(name)
            found[at] = partial(reader.read, link, name)
    for key in names.unknown:
        found[key] = partial(checkpoint.read, key)
    return Tensors(found, ties=names.tied, whole=bool(names.links))


class _Linked:
    """Reads tensors through links; those that come out together are read once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._last: tuple[Link, dict[str, Tensor]] | None = None

    def read(self, link: Link, name: str) -> Tensor:
        if self._last is None or self._last[0] is not link:
            given = {key: self._checkpoint.read(key) for key in link.keys}
            self._last = (link, link.load(given))
        return self._last[1][name]
