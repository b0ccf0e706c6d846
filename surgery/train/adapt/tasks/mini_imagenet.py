"""mini-ImageNet in its usual layouts."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from surgery.errors import DataError
from surgery.train.adapt.tasks.configs import MiniImagenetTasks
from surgery.train.adapt.tasks.episodes import by_class
from surgery.train.adapt.tasks.labelled import assembled
from surgery.train.data.base import Data, Facts, need
from surgery.train.data.folder import Listing, existing
from surgery.train.data.folder import by_class as by_folder
from surgery.train.data.stored import FileSamples
from surgery.train.data.transforms import evaluation

_IMAGES = "images"


def open_mini_imagenet(config: MiniImagenetTasks, *, seed: int) -> Data:
    """Tasks over the classes of a division.

    Args:
        config: The ``data`` section.
        seed: What the tasks of the training are drawn from.

    Raises:
        DataError: the layout is neither of the two, a file is missing or broken, a class is in
            both parts, or there are too few classes or images of one.
    """
    folder = existing(config.path)
    (train, train_classes), (held_out, held_out_classes) = (
        _part(folder, name, config) for name in ("train", config.part)
    )
    both = sorted(train_classes.keys() & held_out_classes.keys())
    need(not both, f"{folder}: classes of both train and {config.part}: {', '.join(both[:5])}")
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
    images = FileSamples(
        base,
        found.paths,
        found.labels,
        evaluation(config.size, "center"),
        channels=config.channels,
        seed=0,
    )
    return images, by_class(found.labels, found.classes or ())


def _listed(table: Path, images: Path) -> Listing:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        missing = [each for each in ("filename", "label") if each not in columns]
        need(not missing, f"{table}:1: no column {' and no column '.join(missing)}")
        rows = [(row["filename"], row["label"]) for row in reader]
    need(bool(rows), f"{table} holds no rows")
    for line, (name, _) in enumerate(rows, 2):
        inside = (images / name).resolve().is_relative_to(images.resolve())
        need(inside, f"{table}:{line}: {name!r} is not inside {images}")
        need((images / name).is_file(), f"{table}:{line}: there is no file {images / name}")
    classes = tuple(sorted({label for _, label in rows}))
    labels = torch.tensor([classes.index(label) for _, label in rows])
    return Listing([name for name, _ in rows], labels, classes)
