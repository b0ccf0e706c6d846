"""Folders of image files, with one subfolder per class or without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from surgery.errors import DataError
from surgery.train.data import images
from surgery.train.data.base import Data, Facts, need
from surgery.train.data.configs import FolderData
from surgery.train.data.stored import FileSamples
from surgery.train.data.transforms import evaluation, split, training


@dataclass(frozen=True)
class Listing:
    """Images under a folder.

    Attributes:
        paths: N paths relative to the folder, sorted.
        labels: int64 (N,), indices into ``classes``; zeros where there are none.
        classes: Names of the class folders, sorted.
    """

    paths: Sequence[str]
    labels: Tensor
    classes: tuple[str, ...] | None


def open_folder(config: FolderData, *, seed: int) -> Data:
    """A folder of images, split into a part to train on and a part to evaluate on.

    Args:
        config: The ``data`` section.
        seed: What augmentation is drawn from; the split does not depend on it.

    Raises:
        DataError: the folder or a class is empty, a file cannot be decoded, or shapes differ.
    """
    folder = existing(config.path)
    found = by_class(folder) if config.labels == "folders" else without_labels(folder)
    shape = _shape(folder, found.paths, config)
    fit = None if config.size is None else config.fit
    plain = evaluation(config.size, fit)
    everything = FileSamples(
        folder, found.paths, found.labels, plain, channels=config.channels, seed=seed
    )
    train, held_out = split(found.labels, config.held_out)
    need(
        len(held_out) > 0,
        f"{folder} holds one image per class, so that none can be held out for evaluation",
        hint="a class needs two images or more",
    )
    return Data(
        train=everything.take(train, training(shape, fit, config.augment)),
        held_out=everything.take(held_out, plain),
        facts=Facts(
            kind=config.kind,
            channels=config.channels,
            size=shape,
            classes=None if found.classes is None else len(found.classes),
            names=found.classes,
        ),
    )


def existing(path: str) -> Path:
    """The folder at a path.

    Raises:
        DataError: there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"data.path {path!r} {problem}; expected a folder of images")
    return folder


def by_class(folder: Path) -> Listing:
    """Images with the name of their subfolder as class; they may lie deeper in it.

    Raises:
        DataError: there are no subfolders, one holds no images, or images lie beside them.
    """
    classes = sorted(
        each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
    )
    loose = sorted(
        each.name for each in folder.iterdir() if each.is_file() and images.is_image(each.name)
    )
    if loose and not classes:
        raise DataError(
            f"{folder} holds images and no folder per class",
            hint="use labels: none, or sort them into a folder for each class",
        )
    if loose:
        raise DataError(
            f"{folder / loose[0]} lies beside the folders of classes, such as {classes[0]}/",
            hint="move it into one of them, or use labels: none",
        )
    need(bool(classes), f"{folder} is empty: expected a folder for each class, with images in it")
    paths: list[str] = []
    counts: list[int] = []
    others: list[str] = []
    for name in classes:
        inside, left_out = images.find(folder / name)
        paths += [f"{name}/{path}" for path in inside]
        others += [f"{name}/{path}" for path in left_out]
        counts.append(len(inside))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise _empty(folder, empty)
    images.report_others(folder, others)
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts))
    return Listing(paths, labels, tuple(classes))


def without_labels(folder: Path) -> Listing:
    """Every image under a folder.

    Raises:
        DataError: there is none.
    """
    paths, others = images.find(folder)
    need(
        bool(paths),
        f"{folder} holds no images"
        + (f", only {len(others)} other files such as {others[0]}" if others else ""),
    )
    images.report_others(folder, others)
    return Listing(paths, torch.zeros(len(paths), dtype=torch.int64), None)


def _shape(folder: Path, paths: Sequence[str], config: FolderData) -> tuple[int, int]:
    if config.check != "none":
        return images.check_files(folder, paths, config.check, config.size)
    assert config.size is not None, "the configuration refuses check: none without a size"  # noqa: S101
    return config.size, config.size


def _empty(folder: Path, empty: Sequence[str]) -> DataError:
    listed = ", ".join(f"{name}/" for name in empty[:5]) + (" ..." if len(empty) > 5 else "")
    return DataError(
        f"{folder}: {len(empty)} class folders hold no images: {listed}",
        hint="remove them, or put images of a known format into them",
    )
