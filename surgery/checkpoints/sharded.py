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
from surgery.untrusted.header import Header, read_header
from surgery.untrusted.index import check_held, check_strays, is_shard, read_index, shard_missing
from surgery.untrusted.paths import check_inside, checked_file, short

SUFFIX = ".safetensors"
#: Stems that libraries write whole models under; taken first where a folder holds several.
STEMS = ("model", "diffusion_pytorch_model")

_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\.[A-Za-z0-9_-]+)?\.json")
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
    fitting = {
        name: known
        for name, known in candidates.items()
        if (known == stem if stem is not None else known in STEMS)
    }
    if stem is None and not fitting:
        fitting = candidates
    if not fitting:
        raise _nothing_found(folder, stem, names)
    if len(fitting) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints: {', '.join(fitting)}",
            hint="move away those that are not meant; a single file and an index of the same name "
            "are read by some libraries in one way, and by some in the other",
        )
    return folder / next(iter(fitting))


def _candidates(names: list[str]) -> dict[str, str]:
    """Files to begin with → their stem."""
    found: dict[str, str] = {}
    for name in names:
        index = _INDEX.fullmatch(name)
        if index is not None:
            found[name] = index["stem"] + (index["variant"] or "")
        elif name.endswith(SUFFIX) and not is_shard(name, SUFFIX):
            found[name] = name.removesuffix(SUFFIX)
    return found


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
    by_file = read_index(index, SUFFIX)
    files = tuple(folder / name for name in sorted(by_file))
    for file in files:
        if not file.exists() and not file.is_symlink():
            raise shard_missing(index, file.name)
        check_inside(file, folder)
    check_strays(index, by_file, SUFFIX)
    checkpoint = _opened(folder, files, index)
    held: dict[str, set[str]] = {name: set() for name in by_file}
    for name, located in checkpoint.tensors.items():
        held[located.file.name].add(name)
    for file, listed in by_file.items():
        check_held(index, file, held[file], listed)
    return checkpoint


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
