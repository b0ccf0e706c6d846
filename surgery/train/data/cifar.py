"""CIFAR-10 and CIFAR-100 in their published binary layout (https://www.cs.toronto.edu/~kriz/cifar.html).

A file is records back to back: the label, one byte (CIFAR-100: the coarse label, then the fine
one), then 3072 bytes of a 3 × 32 × 32 image. Read from the folder or straight from the published
archive; the version of pickled Python objects is never read, for a pickle may run anything.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from surgery.errors import DataError
from surgery.train.data.base import Data, Facts
from surgery.train.data.configs import CifarData
from surgery.train.data.stored import MemorySamples
from surgery.train.data.transforms import evaluation, training

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MOST = 1 << 28  # bytes of a file; the largest published one has 154 million


@dataclass(frozen=True)
class _Layout:
    """One of the two data sets.

    Attributes:
        name: What it is called.
        train: Files to train on, with how many images each holds.
        held_out: Files to evaluate on, likewise.
        labels: Names of the label bytes, in order, with how many classes each tells apart and the
            file that names them.
    """

    name: str
    train: Mapping[str, int]
    held_out: Mapping[str, int]
    labels: Mapping[str, tuple[int, str]]

    @property
    def record(self) -> int:
        """Bytes of one image with its labels."""
        return len(self.labels) + _PIXELS


_LAYOUTS = (
    _Layout(
        "CIFAR-10",
        {f"data_batch_{number}.bin": 10_000 for number in range(1, 6)},
        {"test_batch.bin": 10_000},
        {"fine": (10, "batches.meta.txt")},
    ),
    _Layout(
        "CIFAR-100",
        {"train.bin": 50_000},
        {"test.bin": 10_000},
        {"coarse": (20, "coarse_label_names.txt"), "fine": (100, "fine_label_names.txt")},
    ),
)
_PICKLED = {"data_batch_1", "test_batch", "train", "test", "meta", "batches.meta"}


@dataclass(frozen=True)
class _Files:
    """Files of a folder or an archive, by name."""

    where: Path
    names: frozenset[str]
    read: Callable[[str], bytes]


def open_cifar(config: CifarData, *, seed: int) -> Data:
    """CIFAR, with its own test part for evaluation.

    Args:
        config: The ``data`` section.
        seed: What augmentation is drawn from.

    Raises:
        DataError: there is no such folder or archive, a file is missing or of the wrong size, or a
            label is out of range.
    """
    files = _open(Path(config.path).expanduser())
    layout = _layout(files)
    if config.labels not in layout.labels:
        raise DataError(
            f"{files.where} is {layout.name}, which has no coarse labels",
            hint="use labels: fine, or the path of CIFAR-100",
        )
    classes, names_file = layout.labels[config.labels]
    size = (_SIDE, _SIDE)
    train, train_labels = _images(files, layout, layout.train, config)
    held_out, held_out_labels = _images(files, layout, layout.held_out, config)
    return Data(
        train=MemorySamples(train, train_labels, training(size, None, config.augment), seed),
        held_out=MemorySamples(held_out, held_out_labels, evaluation(None, None), seed),
        facts=Facts(
            kind=config.kind,
            channels=3,
            size=size,
            classes=classes,
            names=_names(files, names_file, classes),
        ),
    )


def _images(
    files: _Files, layout: _Layout, wanted: Mapping[str, int], config: CifarData
) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of some files."""
    column = list(layout.labels).index(config.labels)
    classes = layout.labels[config.labels][0]
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for name, count in wanted.items():
        records = _records(files, layout, name, None if config.subset else count)
        images.append(records[:, len(layout.labels) :].reshape(-1, 3, _SIDE, _SIDE))
        found = records[:, column].to(torch.int64)
        if found.max() >= classes:
            raise DataError(
                f"{files.where}: {name} has the label {int(found.max())} at image "
                f"{int(found.argmax())}, expected 0 to {classes - 1} ({layout.name}, "
                f"{config.labels} labels)",
                hint="the file is damaged or of another data set; extract the archive again",
            )
        labels.append(found)
    return torch.cat(images), torch.cat(labels)


def _records(files: _Files, layout: _Layout, name: str, count: int | None) -> Tensor:
    """The records of a file, uint8 (N, bytes of a record)."""
    if name not in files.names:
        raise DataError(
            f"{files.where} has no {name}, which {layout.name} needs: {_listed(layout)}",
            hint="extract the archive again",
        )
    data = files.read(name)
    if count is not None and len(data) != count * layout.record:
        raise DataError(
            f"{files.where}: {name} has {len(data)} bytes, expected {count * layout.record}: "
            f"{count} records of {layout.record} bytes",
            hint="extract the archive again; for files that hold fewer images on purpose, "
            "use subset: true",
        )
    if not data or len(data) % layout.record:
        raise DataError(
            f"{files.where}: {name} has {len(data)} bytes, expected a multiple of "
            f"{layout.record}, the bytes of a record",
            hint="cut the file at the end of a record",
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, layout.record)


def _names(files: _Files, name: str, classes: int) -> tuple[str, ...] | None:
    """Names of the classes, one per line; None if their file was not kept."""
    if name not in files.names:
        return None
    lines = files.read(name).decode("utf-8", errors="replace").split("\n")
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != classes:
        raise DataError(f"{files.where}: {name} names {len(names)} classes, expected {classes}")
    return names


def _layout(files: _Files) -> _Layout:
    """Which data set it is."""
    found = [each for each in _LAYOUTS if files.names & (each.train.keys() | each.held_out.keys())]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{files.where} holds files of CIFAR-10 and of CIFAR-100",
            hint="keep each in a folder of its own",
        )
    if files.names & _PICKLED:
        raise DataError(
            f"{files.where} holds the version for Python, which is pickled objects and not read",
            hint="use the binary version: cifar-10-binary.tar.gz or cifar-100-binary.tar.gz",
        )
    raise DataError(
        f"{files.where} holds no CIFAR files; expected {_listed(_LAYOUTS[0])} (CIFAR-10) or "
        f"{_listed(_LAYOUTS[1])} (CIFAR-100)",
        hint="data.path is the folder of the .bin files, or the published .tar.gz",
    )


def _listed(layout: _Layout) -> str:
    return ", ".join((*layout.train, *layout.held_out))


def _open(path: Path) -> _Files:
    if path.is_dir():
        names = frozenset(each.name for each in path.iterdir() if each.is_file())
        return _Files(path, names, lambda name: (path / name).read_bytes())
    if not path.exists():
        raise DataError(
            f"data.path {str(path)!r} does not exist; expected a folder of .bin files, or the "
            "published .tar.gz"
        )
    try:
        content = _unpacked(path)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as a .tar.gz: {error}",
            hint="download the archive again, or give the folder it was extracted to",
        ) from None
    return _Files(path, frozenset(content), content.__getitem__)


def _unpacked(path: Path) -> dict[str, bytes]:
    """Files of an archive in memory; nothing is written anywhere."""
    wanted = {name for each in _LAYOUTS for name in (*each.train, *each.held_out)}
    wanted |= {name for each in _LAYOUTS for _, name in each.labels.values()} | _PICKLED
    content: dict[str, bytes] = {}
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if not member.isfile() or name not in wanted:
                continue
            if member.size > _MOST:
                raise DataError(
                    f"{path}: {member.name} has {member.size} bytes, too many for CIFAR"
                )
            content[name] = b"" if name in _PICKLED else _member(archive, member)
    return content


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member) or io.BytesIO()
    data = file.read()
    if len(data) != member.size:
        raise EOFError(f"{member.name} ends after {len(data)} of {member.size} bytes")
    return data
