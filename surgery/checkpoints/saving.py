"""``surgery.save``: a rewritten model, or what was inserted into it, as a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from surgery import progress
from surgery.capture.graft import stock_class
from surgery.checkpoints import base_weights, generation, manifest, tensorfile
from surgery.checkpoints.inventory import Inventory, check_storable, memory_order, take
from surgery.checkpoints.manifest import Base, FileEntry, Manifest, TensorEntry
from surgery.checkpoints.swap import replacing
from surgery.editing import bound, note_state, originals
from surgery.errors import CheckpointError, ModelStateError
from surgery.record import Record, added_names, record_of
from surgery.rules import Recipe
from surgery.save_guard import first_baked
from surgery.sources import describe
from surgery.tree import named_modules, named_parameters

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Named = Sequence[tuple[str, Tensor]]


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    adapter_only: bool = False,
) -> Path:
    """Save a model so that ``surgery.restore`` rebuilds it, rewrites and all.

    The folder holds the weights as safetensors, each rule file that was applied, and
    ``surgery.json``: versions, source, SHA-256 of every file, and the edit log. It is written
    beside its place and exchanged in one step: a kill at any moment leaves the old folder or the
    new one, whole. Tensors are written one by one from where they lie; no second copy of the
    model is held.

    Args:
        model: A model with or without rewrites; a class of the user's own too.
        folder: Created, or replaced if ``save`` wrote everything in it.
        max_shard_size: Weights beyond this are split into files of at most this many bytes, as
            the hub does; an int, or text such as ``"500MB"``.
        adapter_only: Save what the rewrites inserted and nothing of the stock model, with the
            hash of the stock weights that it belongs to. Reads all of them once.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds something else, or a tensor cannot be written (on meta,
            sharded, quantised); nothing was changed then.
        ModelStateError: the model is a wrapper around the one that was rewritten.
    """
    limit = size_of(max_shard_size)
    record = _record(model)
    note_state(model, record)
    content = _adapter(model, record) if adapter_only else _whole(model, record)
    for name, tensor in content.tensors():
        check_storable(name, tensor)
    target = Path(folder)
    with replacing(target, manifest.check_replaceable) as work:
        writer = Writer(work)
        with progress.task("saving", content.nbytes(), "bytes") as task:
            entries = Entries(
                writer.sharded(content.stem, list(content.state.items()), limit, task.advance),
                writer.tensors("buffers", list(content.transient.items()), task.advance),
                writer.tensors("kept", list(content.kept.items()), task.advance),
            )
        writer.recipes(record)
        manifest.write(work, manifest_of(model, record, content, entries, files=writer.files))
    return target


@dataclass
class Content:
    """What goes into the folder."""

    stem: str
    state: dict[str, Tensor]
    transient: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    kept: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    ties: dict[str, str] = field(default_factory=dict[str, str])
    base: dict[str, str] | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that is written."""
        for section in (self.state, self.transient, self.kept):
            yield from section.items()

    def nbytes(self) -> int:
        """Its size in bytes."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())


@dataclass(frozen=True)
class Entries:
    """What was written where."""

    state: dict[str, TensorEntry]
    transient: dict[str, TensorEntry]
    kept: dict[str, TensorEntry]


def _record(model: nn.Module) -> Record:
    record = record_of(model)
    if record is not None:
        return record
    for path, module in named_modules(model):
        if record_of(module) is not None:
            raise ModelStateError(
                f"the rewritten model is {path!r} inside this {type(model).__name__}",
                hint=f"save that: surgery.save(model.{path}, folder)",
            )
    return Record()


def _whole(model: nn.Module, record: Record) -> Content:
    _refuse_extra_state(model)
    found = take(model)
    kept = {
        f"{index}/{name}": tensor
        for index, operation in enumerate(record.operations)
        for name, tensor in operation.kept.items()
    }
    return Content("model", found.state, found.transient, kept, found.ties)


def _refuse_extra_state(model: nn.Module) -> None:
    for path, module in named_modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path} ({type(module).__name__}) keeps state that is no tensor "
                "(get_extra_state), which a folder of tensors does not hold"
            )


def _adapter(model: nn.Module, record: Record) -> Content:
    if not record.operations:
        raise CheckpointError(
            "nothing was inserted into this model, so there is no adapter to save",
            hint="apply a recipe first, or save the whole model",
        )
    lasting = [edit for edit in record.edits if not edit.reversible]
    if lasting:
        raise CheckpointError(
            f"rule {lasting[0].rule!r} changed the stock weight of {lasting[0].site} for good, so "
            "what it inserted is of no use beside the original weights",
            hint="save the whole model, or apply with keep_base: memory",
        )
    _refuse_baked(model, record)
    _refuse_bound(model, record)
    found = take(model)
    inserted = added_names(model)
    state = {name: tensor for name, tensor in found.state.items() if name in inserted}
    stock = base_weights.digests(stock_tensors(model, found, record))
    return Content("adapter", state, base=stock)


def _refuse_baked(model: nn.Module, record: Record) -> None:
    baked = first_baked(model, record)
    if baked is not None:
        raise CheckpointError(
            f"what was inserted at {baked.site} is merged into the stock weight, so it cannot be "
            "saved without it",
            hint="take it out first (surgery.adapters.unmerge of adapters, surgery.undo of a map "
            "that was baked in), or save the whole model",
        )


def _refuse_bound(model: nn.Module, record: Record) -> None:
    edit = next(iter(bound(model, record)), None)
    if edit is not None:
        raise CheckpointError(
            f"the stock weight of {edit.site} changed while what was inserted ({edit.summary}) was "
            "trained, so that is of no use beside the original weight",
            hint="save the whole model; or merge the adapters and save that",
        )


def stock_tensors(model: nn.Module, found: Inventory, record: Record) -> dict[str, Tensor]:
    """The stock tensors of a rewritten model, as they were before any pass changed them."""
    inserted = added_names(model)
    stock = {name: tensor for name, tensor in found.state.items() if name not in inserted}
    for operation in reversed(record.operations):
        stock.update({name: kept for name, kept in operation.kept.items() if name in stock})
    stock.update(originals(model, record))
    return stock


def manifest_of(
    model: nn.Module,
    record: Record,
    content: Content,
    entries: Entries,
    *,
    files: dict[str, FileEntry],
    origin: dict[str, FileEntry] | None = None,
) -> Manifest:
    """What ``surgery.json`` says of a folder.

    Args:
        model: The model whose tensors are in it; they may lie on the meta device.
        record: Its edit log.
        content: What it holds.
        entries: Where that was written.
        files: Every file that was written.
        origin: The files of the checkpoint that it was converted from.
    """
    cls = stock_class(model)
    known = {*entries.state, *content.ties}
    return Manifest(
        kind="model" if content.base is None else "adapter",
        versions=manifest.versions(cls),
        model_class=f"{cls.__module__}.{cls.__qualname__}",
        source=describe(model),
        generation=generation.describe(model),
        files=files,
        state=entries.state,
        transient=entries.transient,
        kept=entries.kept,
        ties=content.ties,
        trainable=[n for n, p in named_parameters(model) if p.requires_grad and n in known],
        training=model.training,
        otherwise=[path for path, m in named_modules(model) if m.training != model.training],
        record=record.to_dict() if record.operations else None,
        base=None if content.base is None else Base(tensors=content.base),
        origin=origin,
    )


def size_of(size: int | str) -> int:
    """A number of bytes, given as such or as text.

    Raises:
        CheckpointError: it is neither.
    """
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(size).upper())
    unit = None if match is None else match[2] if match[2] in _UNITS else None
    if match is None or unit is None or float(match[1]) * _UNITS[unit] < 1:
        raise CheckpointError(
            f"max_shard_size is {size!r}, expected a number of bytes or text such as '5GB'"
        )
    return int(float(match[1]) * _UNITS[unit])


class Writer:
    """Writes the files of one folder and remembers them.

    Args:
        folder: It.
        hashed: Whether files of tensors are hashed while they are written; else they are not
            remembered.
    """

    def __init__(self, folder: Path, *, hashed: bool = True) -> None:
        self.folder = folder
        self.hashed = hashed
        self.files: dict[str, FileEntry] = {}

    def sharded(
        self, stem: str, tensors: Named, limit: int, advance: tensorfile.Advance
    ) -> dict[str, TensorEntry]:
        """One file, or several and the hub's index of them."""
        shards = shards_of(tensors, limit)
        if len(shards) == 1:
            return self.tensors(stem, tensors, advance, even_if_empty=True)
        entries: dict[str, TensorEntry] = {}
        for number, shard in enumerate(shards, start=1):
            entries |= self.tensors(f"{stem}-{number:05d}-of-{len(shards):05d}", shard, advance)
        total = sum(tensor.nbytes for _, tensor in tensors)
        places = {name: entries[name].file for name, _ in tensors}
        self.text(f"{stem}.safetensors.index.json", index_of(total, places))
        return {name: entries[name] for name, _ in tensors}

    def tensors(
        self,
        stem: str,
        tensors: Named,
        advance: tensorfile.Advance,
        *,
        even_if_empty: bool = False,
    ) -> dict[str, TensorEntry]:
        """One safetensors file; none if there is nothing to write."""
        if not tensors and not even_if_empty:
            return {}
        file = f"{stem}.safetensors"
        if self.hashed:
            digest = tensorfile.write(self.folder / file, tensors, advance)
            self._remember(file, digest)
        else:
            tensorfile.write_unhashed(self.folder / file, tensors, advance)
        return {
            name: TensorEntry(
                file=file,
                dtype=tensorfile.DTYPES[tensor.dtype],
                shape=list(tensor.shape),
                stride=memory_order(tensor),
            )
            for name, tensor in tensors
        }

    def recipes(self, record: Record) -> None:
        """``recipe.yaml``, and ``recipe-2.yaml`` and so on where several were applied."""
        for number, operation in enumerate(record.operations, start=1):
            name = "recipe.yaml" if number == 1 else f"recipe-{number}.yaml"
            self.text(name, Recipe.parse(operation.recipe).to_yaml())

    def text(self, name: str, text: str) -> None:
        """A text file."""
        data = text.encode()
        with (self.folder / name).open("xb") as file:
            file.write(data)
        self._remember(name, sha256(data).hexdigest())

    def _remember(self, name: str, digest: str) -> None:
        size = (self.folder / name).stat().st_size
        self.files[name] = FileEntry(bytes=size, sha256=digest)


def index_of(total: int, places: dict[str, str]) -> str:
    """The text of the hub's index of a sharded checkpoint.

    Args:
        total: Bytes of all tensors.
        places: Name of each tensor → the file it lies in.
    """
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return json.dumps(index, indent=2) + "\n"


def shards_of(tensors: Named, limit: int) -> list[Named]:
    """Tensors in order, cut wherever the next one would pass the limit."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    filled = 0
    for name, tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += tensor.nbytes
    return cast("list[Named]", shards)
