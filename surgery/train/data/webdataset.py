"""Tar shards in the WebDataset layout (https://github.com/webdataset/webdataset).

A sample is the members that share a name up to the first dot: ``n01/0007.jpg``, ``n01/0007.cls``.

A table of where every member lies is made first, and samples are then read at random like those of
any other kind. The order is therefore one permutation over all shards; to resume is to know a
position; ranks and workers never meet. The ``webdataset`` library streams shards through a buffer
instead, whose content a resume would lose. The price: shards must lie on a local or mounted disk,
uncompressed.

Nothing is extracted, so a member's name is never a path.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery import files, progress
from surgery.errors import DataError
from surgery.train.data import images
from surgery.train.data.base import Data, Facts, need
from surgery.train.data.configs import Channels, WebDatasetData
from surgery.train.data.stored import ImageSamples
from surgery.train.data.transforms import Pipeline, evaluation, split, training

_BLOCK = 512  # bytes; a tar ends with blocks of zeros
_MOST_LABEL = 1 << 20  # bytes of a member that holds a label
_MOST_SHARDS = 100_000
_FORMAT = 1
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Member(NamedTuple):
    """A file in a shard: bytes ``start`` to ``start + size``."""

    start: int
    size: int


@dataclass(frozen=True)
class Table:
    """Where N samples lie.

    Attributes:
        shards: Files, in the order of the pattern.
        shard: Index into ``shards``, int64 (N,).
        start: First byte of the image, int64 (N,).
        size: Bytes of the image, int64 (N,).
        label: int64 (N,); zeros for data without labels.
        key: What the members of the sample share, bytes (N,).
    """

    shards: tuple[Path, ...]
    shard: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    key: NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, indices: NDArray[np.int64]) -> Table:
        """Some of the samples."""
        return Table(
            self.shards,
            self.shard[indices],
            self.start[indices],
            self.size[indices],
            self.label[indices],
            self.key[indices],
        )

    def name(self, index: int) -> str:
        """What errors call a sample."""
        key = os.fsdecode(bytes(self.key[index]))
        return f"{self.shards[int(self.shard[index])]}: sample {key!r}"

    def read(self, index: int) -> BinaryIO:
        """The bytes of a sample's image.

        Raises:
            DataError: the shard has become shorter, or is gone.
        """
        shard, size = self.shards[int(self.shard[index])], int(self.size[index])
        try:
            with shard.open("rb") as file:
                file.seek(int(self.start[index]))
                data = file.read(size)
        except FileNotFoundError:
            raise DataError(f"{shard} is gone since the data was opened") from None
        need(len(data) == size, f"{self.name(index)} is cut off; the shard has become shorter")
        return io.BytesIO(data)


class ShardSamples(ImageSamples):
    """Images in tar shards.

    Args:
        table: Where they lie.
        pipeline: What is done to an image.
        channels: 1 or 3.
        seed: What augmentation is drawn from.
    """

    def __init__(self, table: Table, pipeline: Pipeline, *, channels: Channels, seed: int) -> None:
        super().__init__(torch.from_numpy(table.label), pipeline, seed)  # pyright: ignore[reportUnknownMemberType]
        self.table = table
        self.channels: Channels = channels

    def image(self, index: int) -> Any:
        """Decode an image."""
        return images.decode(self.table.read(index), self.table.name(index), self.channels)

    def take(self, indices: Tensor, pipeline: Pipeline) -> Self:
        """Some of the samples."""
        table = self.table.take(indices.numpy())
        return type(self)(table, pipeline, channels=self.channels, seed=self.seed)

    def identity(self) -> str:
        """A hash of the table."""
        table = self.table
        digest = hashlib.sha256("\0".join(shard.name for shard in table.shards).encode())
        for column in (table.shard, table.start, table.size, table.label, table.key):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


def open_webdataset(config: WebDatasetData, *, seed: int) -> Data:
    """Tar shards, with a part of the samples or shards of their own for evaluation.

    Args:
        config: The ``data`` section.
        seed: What augmentation is drawn from; the split does not depend on it.

    Raises:
        DataError: a shard is missing, damaged or compressed, a sample lacks its image or label,
            or an image cannot be decoded.
    """
    train = _table(config, config.path, config.index)
    if isinstance(config.held_out, str):
        index = None if config.index is None else f"{config.index}.held_out"
        held_out = _table(config, config.held_out, index)
        twice = {os.path.realpath(shard) for shard in train.shards} & {
            os.path.realpath(shard) for shard in held_out.shards
        }
        if twice:
            raise DataError(f"{min(twice)} is a shard of data.path and of data.held_out")
    else:
        kept, left = split(torch.tensor(train.label), config.held_out)
        need(len(left) > 0, f"{config.path}: of one sample per class none can be held out")
        train, held_out = train.take(kept.numpy()), train.take(left.numpy())
    classes = _classes(config, train, held_out)
    shape = _shape(config, train, held_out)
    fit = None if config.size is None else config.fit
    return Data(
        train=ShardSamples(
            train, training(shape, fit, config.augment), channels=config.channels, seed=seed
        ),
        held_out=ShardSamples(
            held_out, evaluation(config.size, fit), channels=config.channels, seed=seed
        ),
        facts=Facts(kind=config.kind, channels=config.channels, size=shape, classes=classes),
    )


def expand(pattern: str) -> list[str]:
    """Paths that a brace pattern stands for: ``{000..009}`` counts, ``{a,b}`` lists.

    Raises:
        DataError: the braces are not of these two forms, or there are too many paths.
    """
    parts = _BRACES.split(pattern)
    choices = [
        [part] if number % 2 == 0 else _choices(part, pattern) for number, part in enumerate(parts)
    ]
    if any("{" in part or "}" in part for part in parts[::2]):
        raise DataError(f"data.path {pattern!r} has braces that do not pair, or lie in each other")
    total = 1
    for choice in choices:
        total *= len(choice)
    need(total <= _MOST_SHARDS, f"data.path {pattern!r} stands for {total} shards, too many")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(text: str, pattern: str) -> list[str]:
    counted = _RANGE.fullmatch(text)
    if counted is None:
        if "," in text:
            return text.split(",")
        raise DataError(
            f"data.path {pattern!r}: {{{text}}} is neither a range nor a list",
            hint="as in shard-{000..009}.tar or {train,extra}.tar",
        )
    first, last = int(counted[1]), int(counted[2])
    if not 0 <= last - first < _MOST_SHARDS:
        raise DataError(
            f"data.path {pattern!r}: {{{text}}} counts from {first} to {last}",
            hint="the first number is the smaller one",
        )
    # As in a shell: zeros in front of either number set the width of all.
    width = max((len(end) for end in counted.groups() if end.startswith("0")), default=0)
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def find_shards(path: str) -> tuple[Path, ...]:
    """Shards that a path, a folder or a brace pattern stands for.

    Raises:
        DataError: there are none, one is missing, or they are not local.
    """
    scheme, colon, _ = path.partition(":")
    if colon and (scheme == "pipe" or path.startswith(f"{scheme}://")):
        raise DataError(
            f"data.path {path!r} is not local; shards are read at random places",
            hint="copy or mount them",
        )
    folder = Path(path).expanduser()
    if folder.is_dir():
        found = tuple(sorted(folder.glob("*.tar")))
        need(bool(found), f"{folder} holds no .tar files")
        return found
    shards = tuple(Path(each).expanduser() for each in expand(path))
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(
            f"data.path {path!r}: {len(missing)} of {len(shards)} shards do not exist, such as "
            f"{missing[0]}",
            hint="expected a shard, a folder of shards, or a pattern such as shard-{000..009}.tar",
        )
    return shards


def _table(config: WebDatasetData, path: str, index: str | None) -> Table:
    shards = find_shards(path)
    if index is None:
        return _scan(config, path, shards)
    kept = Path(index).expanduser()
    made_of = _made_of(config, shards)
    table = _read_index(kept, shards, made_of)
    if table is None:
        table = _scan(config, path, shards)
        _write_index(kept, table, made_of)
    return table


def _scan(config: WebDatasetData, path: str, shards: Sequence[Path]) -> Table:
    """The table, from the headers of all shards."""
    rows: list[tuple[int, int, int, int]] = []
    keys: list[bytes] = []
    for number, shard in enumerate(progress.track(shards, f"reading the headers of {path}")):
        with shard.open("rb") as file:
            for key, members in _samples(shard, file):
                start, size = _image(config, shard, key, members)
                rows.append((number, start, size, _label(config, shard, file, key, members)))
                keys.append(os.fsencode(key))
    need(bool(rows), f"data.path {path!r}: the shards hold no samples")
    columns = np.array(rows, dtype=np.int64)
    shard, start, size, label = (np.ascontiguousarray(column) for column in columns.T)
    return Table(tuple(shards), shard, start, size, label, np.array(keys))


def _samples(shard: Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, Member]]]:
    """Samples of a shard: what their members' names begin with, and the members by ending."""
    seen: set[str] = set()
    members: dict[str, Member] = {}
    current: str | None = None
    for name, member in _members(shard, file):
        parsed = _KEY.fullmatch(name)
        if parsed is None:
            continue  # without an ending it belongs to no sample
        key, ending = parsed[1], parsed[2].lower()
        if key != current:
            if current is not None:
                yield current, members
            if key in seen:
                raise DataError(
                    f"{shard}: the members of sample {key!r} do not lie together",
                    hint="sort the files by name before they are packed (tar --sort=name)",
                )
            seen.add(key)
            current, members = key, {}
        if ending in members:
            raise DataError(f"{shard}: sample {key!r} has two members .{ending}")
        members[ending] = member
    if current is not None:
        yield current, members


def _members(shard: Path, file: BinaryIO) -> Iterator[tuple[str, Member]]:
    """Regular files of a shard by name; folders are passed over.

    ``tarfile`` takes a broken header for the end of the archive, so the end is looked at.
    """
    length = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if member.size < 0 or member.offset_data + member.size > length:
                    raise DataError(f"{shard} is truncated or damaged in member {member.name!r}")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{shard}: member {member.name!r} is no plain file but a link, a device "
                        "or sparse",
                        hint="pack the files themselves (tar --dereference --hard-dereference)",
                    )
                yield member.name, Member(member.offset_data, member.size)
                cast("Any", archive).members.clear()  # it would keep them all
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _unreadable(shard, file, error) from None
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(
            f"{shard} is truncated or damaged at byte {end}: no header and no end of archive there",
            hint="copy or pack the shard again",
        )


def _unreadable(shard: Path, file: BinaryIO, error: Exception) -> DataError:
    file.seek(0)
    packed = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
    how = packed.get(file.read(2))
    if how is not None:
        return DataError(
            f"{shard} is compressed with {how}; samples are read at random places",
            hint="decompress the shards once; images are compressed already",
        )
    return DataError(f"{shard} cannot be read as a tar archive: {error}")


def _image(config: WebDatasetData, shard: Path, key: str, members: dict[str, Member]) -> Member:
    found = [ending for ending in members if ending in config.images]
    if len(found) == 1:
        return members[found[0]]
    have = ", ".join(f".{ending}" for ending in members)
    problem = "several images" if found else "no image"
    raise DataError(
        f"{shard}: sample {key!r} has {problem}; it has {have}",
        hint="set data.images to the ending of the image, as in [jpg]",
    )


def _label(
    config: WebDatasetData, shard: Path, file: BinaryIO, key: str, members: dict[str, Member]
) -> int:
    if config.label is None:
        return 0
    ending, _, field = config.label.partition(":")
    member = members.get(ending)
    if member is None:
        have = ", ".join(f".{each}" for each in members)
        raise DataError(
            f"{shard}: sample {key!r} has no label .{ending}; it has {have}",
            hint="set data.label to the ending of the label, or to null for data without labels",
        )
    need(member.size <= _MOST_LABEL, f"{shard}: the label of {key!r} has {member.size} bytes")
    file.seek(member.start)
    label = _parse(file.read(member.size), field)
    if label is None:
        raise DataError(
            f"{shard}: the label of sample {key!r} is no number from 0 on"
            + (f" under {field!r}" if field else ""),
            hint="expected a class number as text, or data.label as json:KEY",
        )
    return label


def _parse(data: bytes, field: str) -> int | None:
    """A class number from a member's bytes; None if they hold none."""
    if not field:
        text = data.strip()
        return int(text) if text.isdigit() and len(text) < 10 else None
    try:
        loaded: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(loaded, dict):
        return None
    value: object = cast("dict[str, object]", loaded).get(field)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < 10**9 else None


def _classes(config: WebDatasetData, train: Table, held_out: Table) -> int | None:
    if config.label is None:
        return None
    for table in (train, held_out):
        highest = int(table.label.argmax())
        if config.classes is not None and table.label[highest] >= config.classes:
            raise DataError(
                f"{table.name(highest)} has the label {table.label[highest]}, and data.classes is "
                f"{config.classes}: expected 0 to {config.classes - 1}"
            )
    return config.classes or int(max(train.label.max(), held_out.label.max())) + 1


def _shape(config: WebDatasetData, *tables: Table) -> tuple[int, int]:
    if config.check == "none":
        assert config.size is not None, "the configuration refuses check: none without a size"  # noqa: S101
        return config.size, config.size
    files = (
        (table.name(index), partial(table.read, index))
        for table in tables
        for index in range(len(table))
    )
    count = sum(len(table) for table in tables)
    return images.check(config.path, files, count, config.check, config.size)


# --- the table on disk ------------------------------------------------------------------------


def _made_of(config: WebDatasetData, shards: Sequence[Path]) -> str:
    """Text that changes with the shards, and with what is looked for in them."""
    facts = [
        _FORMAT,
        config.images,
        config.label,
        [(str(shard), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read_index(path: Path, shards: tuple[Path, ...], made_of: str) -> Table | None:
    """The table, or None if there is none or the shards have changed since.

    Raises:
        DataError: the file is something else.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["made_of"]) != made_of:
                return None
            columns = [stored[name] for name in ("shard", "start", "size", "label", "key")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is no table of members: {error}",
            hint="data.index is a file that is written here; remove it, or name another",
        ) from None
    return Table(shards, *columns)


def _write_index(path: Path, table: Table, made_of: str) -> None:
    """Write the table beside its place, then rename: another rank may be writing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # savez would put ".npz" behind a path; an open file keeps its name.
    with files.beside(path) as work, work.open("wb") as file:
        np.savez(
            file,
            made_of=np.array(made_of),
            shard=table.shard,
            start=table.start,
            size=table.size,
            label=table.label,
            key=table.key,
        )
