"""A checkpoint of one or many safetensors files, opened without reading a weight.

Everything in the folder is taken for what a stranger wrote: names, links, the index and every
header are checked before the first tensor is allocated, and a file that changes afterwards is
noticed. Nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from torch import Tensor

from surgery.checkpoints.tensorfile import Slot, read_slot
from surgery.errors import CheckpointError
from surgery.untrusted.documents import read_object
from surgery.untrusted.header import Header, read_header
from surgery.untrusted.paths import check_inside, checked_file, plain_name, short

SUFFIX = ".safetensors"
#: Stems that libraries write whole models under; taken first where a folder holds several.
STEMS = ("model", "diffusion_pytorch_model")

_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\.[A-Za-z0-9_-]+)?\.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Located:
    """Where one tensor of a checkpoint lies.

    Attributes:
        file: The file.
        slot: Its dtype, its shape, and its bytes in that file.
    """

    file: Path
    slot: Slot


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What changes when a file is written to or replaced."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, found: os.stat_result) -> _Stamp:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, as its headers say they are; made by ``open_checkpoint``.

    Reading may go on in several threads: each call opens its file anew.

    Attributes:
        folder: The folder, as it was given.
        files: The safetensors files, sorted by name.
        index: The file that says which tensor lies where; None for a single file.
        tensors: Where each tensor lies, by name, file by file in the order of the headers.
        metadata: The free text of the files' headers by key; of several files, that of the first
            that has the key.
    """

    folder: Path
    files: tuple[Path, ...]
    index: Path | None
    tensors: Mapping[str, Located]
    metadata: Mapping[str, str]
    _stamps: Mapping[Path, _Stamp]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(located.slot.nbytes for located in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own.

        Raises:
            CheckpointError: there is no such tensor, or the file changed since it was opened.
        """
        located = self._located(name)
        with self._opened(located.file) as file:
            return read_slot(located.file, file, located.slot)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, (stop - start, ...), and nothing else of it.

        Raises:
            CheckpointError: as ``read``; the tensor has no rows, or fewer.
        """
        located = self._located(name)
        slot = located.slot
        if not slot.shape or not 0 <= start <= stop <= slot.shape[0]:
            raise CheckpointError(
                f"{name} has the shape {list(slot.shape)}, and no rows {start} to {stop}"
            )
        row = slot.nbytes // slot.shape[0] if slot.shape[0] else 0
        part = Slot(
            slot.dtype,
            (stop - start, *slot.shape[1:]),
            slot.start + start * row,
            slot.start + stop * row,
        )
        with self._opened(located.file) as file:
            return read_slot(located.file, file, part)

    def check_unchanged(self) -> None:
        """Look at every file once more.

        Raises:
            CheckpointError: one was written to, replaced or removed since it was opened.
        """
        for file, stamp in self._stamps.items():
            _check_stamp(file, stamp, checked_file(file))

    def _located(self, name: str) -> Located:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {short(repr(name))}")
        return self.tensors[name]

    def _opened(self, path: Path) -> BinaryIO:
        # Unbuffered: what is read goes right into the tensor.
        checked_file(path)
        file = cast("BinaryIO", path.open("rb", buffering=0))
        try:
            _check_stamp(path, self._stamps[path], os.fstat(file.fileno()))
        except BaseException:
            file.close()
            raise
        return file


def open_checkpoint(folder: str | os.PathLike[str], stem: str | None = None) -> Checkpoint:
    """Open the safetensors checkpoint in a folder: headers are read and checked, no tensor is.

    Args:
        folder: One ``.safetensors`` file, or shards with their ``*.safetensors.index.json``, in
            the layout of the hub. Links that lead out of it are refused, but for those of the
            Hugging Face cache.
        stem: Which of several, such as ``model`` for ``model.safetensors`` or for the shards
            that ``model.safetensors.index.json`` lists. By default ``model`` or
            ``diffusion_pytorch_model`` if it is there, or else the only one.

    Raises:
        CheckpointError: the folder holds none, or several; or anything in it is not what it says:
            see ``surgery.untrusted``. No tensor was allocated then.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder, expected one that holds a checkpoint")
    found = _choose(path, stem)
    check_inside(found, path)
    if found.name.endswith(SUFFIX):
        return _opened(path, (found,), None)
    return _sharded(path, found)


def _choose(folder: Path, stem: str | None) -> Path:
    """The single file, or the index, that is meant."""
    names = sorted(each.name for each in folder.iterdir())
    candidates = _candidates(names)
    wanted = (stem,) if stem is not None else STEMS
    for each in wanted:
        if each in candidates:
            return folder / candidates[each]
    if not candidates or stem is not None:
        raise _nothing_found(folder, stem, names)
    if len(candidates) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints: {', '.join(candidates.values())}",
            hint="say which: move the others away, or give its stem",
        )
    return folder / next(iter(candidates.values()))


def _candidates(names: list[str]) -> dict[str, str]:
    """Stem → the file to begin with; a single file before an index, as libraries take them."""
    indexes = {
        match["stem"] + (match["variant"] or ""): name
        for name in names
        if (match := _INDEX.fullmatch(name))
    }
    singles = {
        stem: name
        for name in names
        if name.endswith(SUFFIX) and not _SHARD.search(stem := name.removesuffix(SUFFIX))
    }
    return indexes | singles


def _nothing_found(folder: Path, stem: str | None, names: list[str]) -> CheckpointError:
    expected = f"{stem or '*'}{SUFFIX} or its .index.json"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return CheckpointError(
            f"{folder} holds the pickle {short(repr(pickles[0]))} and no {expected}: pickles can "
            "run code and are not read",
            hint="load the model with its own library, and save it as safetensors",
        )
    shown = ", ".join(short(repr(name)) for name in names[:6]) or "nothing"
    return CheckpointError(f"{folder} holds no {expected}, but {shown}")


def _sharded(folder: Path, index: Path) -> Checkpoint:
    by_file = _listed(index)
    files = tuple(folder / name for name in sorted(by_file))
    for file in files:
        _check_shard(folder, index, file)
    _check_strays(folder, index, set(by_file))
    checkpoint = _opened(folder, files, index)
    held: dict[str, set[str]] = {name: set() for name in by_file}
    for name, located in checkpoint.tensors.items():
        held[located.file.name].add(name)
    for file, listed in by_file.items():
        _check_same(index, file, held[file], listed)
    return checkpoint


def _listed(index: Path) -> dict[str, set[str]]:
    """The tensors that an index lists, by file."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty 'weight_map'")
    by_file: dict[str, set[str]] = {}
    for name, file in cast("dict[str, object]", weight_map).items():
        by_file.setdefault(plain_name(file, str(index), suffix=SUFFIX), set()).add(name)
    return by_file


def _check_shard(folder: Path, index: Path, file: Path) -> None:
    if not file.exists() and not file.is_symlink():
        raise CheckpointError(
            f"{index} names the file {short(repr(file.name))}, which is not there",
            hint="the checkpoint is incomplete; download or copy it again",
        )
    check_inside(file, folder)


def _check_strays(folder: Path, index: Path, listed: set[str]) -> None:
    stem = index.name.partition(SUFFIX)[0]
    strays = [
        each.name
        for each in sorted(folder.iterdir())
        if each.name not in listed
        and each.name.endswith(SUFFIX)
        and (cut := _SHARD.search(each.stem))
        and each.name[: cut.start()] == stem
    ]
    if strays:
        raise CheckpointError(
            f"the shard {short(repr(strays[0]))} is there, but {index} does not list it",
            hint="the index belongs to another save of the model; download or copy both again",
        )


def _check_same(index: Path, file: str, held: set[str], listed: set[str]) -> None:
    if absent := sorted(listed - held):
        raise CheckpointError(
            f"{index} says that {file!r} holds {short(repr(absent[0]))}, which it does not "
            f"({len(absent)} such names)"
        )
    if extra := sorted(held - listed):
        raise CheckpointError(
            f"{file!r} holds {short(repr(extra[0]))}, which {index} does not list there "
            f"({len(extra)} such names)"
        )


def _opened(folder: Path, files: tuple[Path, ...], index: Path | None) -> Checkpoint:
    tensors: dict[str, Located] = {}
    metadata: dict[str, str] = {}
    stamps: dict[Path, _Stamp] = {}
    for file in files:
        header, stamps[file] = _header(file)
        for name, slot in header.slots.items():
            if name in tensors:
                raise CheckpointError(
                    f"{short(repr(name))} is in {tensors[name].file.name} and in {file.name}"
                )
            tensors[name] = Located(file, slot)
        metadata = {**header.metadata, **metadata}
    if index is not None:
        stamps[index] = _Stamp.of(checked_file(index))
    return Checkpoint(folder, files, index, tensors, metadata, stamps)


def _header(file: Path) -> tuple[Header, _Stamp]:
    before = _Stamp.of(checked_file(file))
    header = read_header(file)
    _check_stamp(file, before, checked_file(file))
    return header, before


def _check_stamp(file: Path, stamp: _Stamp, found: os.stat_result) -> None:
    if _Stamp.of(found) != stamp:
        raise CheckpointError(
            f"{file} changed while it was read",
            hint="wait until whatever writes it is done, and start again",
        )
