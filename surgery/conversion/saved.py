"""The folder of a rewritten model, as ``surgery.save`` would have written it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.checkpoints import manifest, tensorfile
from surgery.checkpoints.inventory import memory_order, take
from surgery.checkpoints.manifest import FileEntry, TensorEntry
from surgery.checkpoints.saving import Content, Entries, Writer, index_of, manifest_of, shards_of
from surgery.conversion.begun import Beginnings, kept_key
from surgery.conversion.jobs import Job, Whole, joined
from surgery.conversion.journal import Finished
from surgery.conversion.layout import OutFile, empty, spots_of
from surgery.conversion.output import Output
from surgery.conversion.stock import Stock
from surgery.editing import note_state
from surgery.record import Record, record_of


class Saved(Output):
    """What ``surgery.restore`` reads.

    Args:
        model: The rewritten model: its parameters on the meta device, its buffers real.
        stock: Its stock tensors.
        limit: Most bytes per file of weights.
    """

    kind = "saved model"

    def __init__(self, model: nn.Module, stock: Stock, limit: int) -> None:
        self._model = model
        self._record = record_of(model) or Record()
        first = take(model).ties
        like = stock.like

        def read(name: str) -> Tensor:
            return stock.whole(name, like[name].dtype)

        self._begun = Beginnings(model, self._record.operations[0], first, read)
        self._begun.at_once()
        found = take(model)
        names = [name for group in self._begun.groups for name in group.keeps]
        self._kept_names = {name: like[first.get(name, name)] for name in names}
        kept = {kept_key(name): tensor for name, tensor in self._kept_names.items()}
        self._content = Content("model", found.state, found.transient, kept, found.ties)
        self._shards = _named(shards_of([(n, _form(t)) for n, t in found.state.items()], limit))
        self._buffers = _one("buffers", found.transient)
        self._kept = _one("kept", kept)
        self.files = [*self._shards, *self._buffers, *self._kept]
        self.jobs = joined(self._jobs(stock))

    def check_replaceable(self, folder: Path) -> None:
        """Raise unless ``surgery.save`` wrote everything in the folder."""
        manifest.check_replaceable(folder)

    def notes(self, file: OutFile) -> Mapping[str, Any]:
        """What came of the edits that wrote to a file."""
        return self._begun.notes(file)

    def resume(self, notes: Mapping[str, Any]) -> None:
        """Take over what came of edits that were begun before."""
        self._begun.resume(notes)

    def finish(
        self, work: Path, finished: Mapping[str, Finished], origin: Mapping[str, FileEntry]
    ) -> None:
        """The index, the recipe and ``surgery.json``."""
        writer = Writer(work)
        self._note(writer, self._shards, finished)
        if len(self._shards) > 1:
            places = {name: file.name for file in self._shards for name, _ in file.tensors}
            total = sum(each.nbytes for each in self._content.state.values())
            ordered = {name: places[name] for name in self._content.state}
            writer.text("model.safetensors.index.json", index_of(total, ordered))
        self._note(writer, [*self._buffers, *self._kept], finished)
        writer.recipes(self._record)
        note_state(self._model, self._record)
        # Their values are in the folder; the log says which there are.
        self._record.operations[0].kept.update(self._kept_names)
        entries = Entries(
            _entries(self._content.state, self._shards),
            _entries(self._content.transient, self._buffers),
            _entries(self._content.kept, self._kept),
        )
        told = manifest_of(
            self._model,
            self._record,
            self._content,
            entries,
            files=writer.files,
            origin=dict(origin),
        )
        manifest.write(work, told)

    def _note(self, writer: Writer, files: list[OutFile], finished: Mapping[str, Finished]) -> None:
        for file in files:
            entry = finished[file.name]
            writer.files[file.name] = FileEntry(bytes=entry.bytes, sha256=entry.sha256)

    def _jobs(self, stock: Stock) -> list[Job]:
        """In the order of the tensors they write; what is held in memory last."""
        spots, found = spots_of(self.files), self._content
        maker = {
            name: group for group in self._begun.groups for name in (*group.needs, *group.adds)
        }
        jobs: list[Job] = []
        done: set[int] = set()
        for name in (name for file in self._shards for name, _ in file.tensors):
            tensor, group = found.state[name], maker.get(name)
            if group is None and name in stock.like:
                jobs += stock.by_name(name, tensor, spots[name])
            elif group is None:
                jobs.append(Whole(lambda tensor=tensor: {"": tensor}, {"": spots[name]}))
            elif id(group) not in done:
                done.add(id(group))
                written = [*group.needs, *group.adds, *map(kept_key, group.keeps)]
                jobs.append(self._begun.job(group, {each: spots[each] for each in written}))
        for name, tensor in found.transient.items():
            jobs.append(Whole(lambda tensor=tensor: {"": tensor}, {"": spots[name]}))
        return jobs


def _form(tensor: Tensor) -> Tensor:
    return empty(tensor.shape, tensor.dtype)


def _named(shards: list[Any]) -> list[OutFile]:
    """The files of weights under the names that ``surgery.save`` gives them."""
    if len(shards) == 1:
        return [OutFile.of("model.safetensors", shards[0])]
    count = len(shards)
    return [
        OutFile.of(f"model-{number:05d}-of-{count:05d}.safetensors", shard)
        for number, shard in enumerate(shards, start=1)
    ]


def _one(stem: str, tensors: Mapping[str, Tensor]) -> list[OutFile]:
    """A file of further tensors; none if there are none."""
    forms = [(name, _form(tensor)) for name, tensor in tensors.items()]
    return [OutFile.of(f"{stem}.safetensors", forms)] if forms else []


def _entries(tensors: Mapping[str, Tensor], files: list[OutFile]) -> dict[str, TensorEntry]:
    places = {name: file.name for file in files for name, _ in file.tensors}
    return {
        name: TensorEntry(
            file=places[name],
            dtype=tensorfile.DTYPES[tensor.dtype],
            shape=list(tensor.shape),
            stride=memory_order(tensor),
        )
        for name, tensor in tensors.items()
    }
