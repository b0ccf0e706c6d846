"""mini-ImageNet in its usual layouts."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import torch

from surgery.errors import DataError
from surgery.train.adapt.tasks.configs import MiniImagenetTasks
from surgery.train.adapt.tasks.episodes import by_class, check_apart
from surgery.train.adapt.tasks.labelled import assembled
from surgery.train.data.base import Data, Facts, need
from surgery.train.data.folder import Listing, existing
from surgery.train.data.folder import by_class as by_folder
from surgery.train.data.images import check_files
from surgery.train.data.stored import FileSamples
from surgery.train.data.transforms import evaluation

_IMAGES = "images"


def open_mini_imagenet(config: MiniImagenetTasks, *, seed: int) -> Data:
    """Tasks over the classes of a division.

    Args:
        config: The ``data`` section.
        seed: What the tasks of the training are drawn from.

    Raises:
        DataError: the layout is neither of the two, a file is missing or no image, a class or an
            image is in both parts, or there are too few classes or images of one.
    """
    folder = existing(config.path)
    (train, train_classes), (held_out, held_out_classes) = (
        _part(folder, name, config) for name in ("train", config.part)
    )
    check_apart(folder, ("train", train_classes), (config.part, held_out_classes))
    if train.folder == held_out.folder:
        check_apart(folder, ("train", _names(train)), (config.part, _names(held_out)))
    facts = Facts(config.kind, channels=config.channels, size=(config.size, config.size))
    return assembled(config, facts, (train, held_out), (train_classes, held_out_classes), seed)


def _part(
    folder: Path, name: str, config: MiniImagenetTasks
) -> tuple[FileSamples, dict[str, list[int]]]:
    table = folder / f"{name}.csv"
    if table.is_file():
        base, found = folder / _IMAGES, _listed(table, folder / _IMAGES)
    elif (folder / name).is_dir():
        base, found = folder / name, by_folder(folder / name)
    else:
        raise DataError(
            f"{folder} has neither {name}.csv nor a folder {name}",
            hint=f"expected images/*.jpg beside {name}.csv, or {name}/CLASS/*.jpg",
        )
    check_files(base, found.paths, "headers", config.size)
    images = FileSamples(
        base,
        found.paths,
        found.labels,
        evaluation(config.size, "center"),
        channels=config.channels,
        seed=0,
    )
    return images, by_class(found.labels, found.classes or ())


def _names(images: FileSamples) -> list[str]:
    return [os.fsdecode(bytes(path)) for path in images.paths]


def _listed(table: Path, images: Path) -> Listing:
    rows = _rows(table)
    first: dict[str, int] = {}
    for line, (name, label) in enumerate(rows, 2):
        place = f"{table}:{line}"
        need(bool(name and label), f"{place}: expected a filename and a label")
        inside = (images / name).resolve().is_relative_to(images.resolve())
        need(inside, f"{place}: {name!r} is not inside {images}")
        need((images / name).is_file(), f"{place}: there is no file {images / name}")
        # A sample that is there twice could be in the support and in the query set of a task.
        before = first.setdefault(name, line)
        need(before == line, f"{place}: {name} is in line {before} already")
    classes = tuple(sorted({label for _, label in rows}))
    labels = torch.tensor([classes.index(label) for _, label in rows])
    return Listing([name for name, _ in rows], labels, classes)


def _rows(table: Path) -> list[tuple[str, str]]:
    """Names of files and labels; empty where a row has none."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is no text in UTF-8: {error}") from None
    need("\0" not in text, f"{table} holds a null byte, and is no table")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or ()
    missing = [each for each in ("filename", "label") if each not in columns]
    need(not missing, f"{table}:1: no column {' and no column '.join(missing)}")
    rows = [(row["filename"] or "", row["label"] or "") for row in reader]
    need(bool(rows), f"{table} holds no rows")
    return rows
