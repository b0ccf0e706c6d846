"""Omniglot in the layout of its authors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.train.adapt.tasks.configs import OmniglotTasks
from surgery.train.adapt.tasks.episodes import by_class, check_apart
from surgery.train.adapt.tasks.labelled import assembled
from surgery.train.data.base import Batch, Data, Facts, Samples, need
from surgery.train.data.folder import existing
from surgery.train.data.images import check_files, is_image
from surgery.train.data.stored import FileSamples
from surgery.train.data.transforms import evaluation

TRAIN, HELD_OUT = "images_background", "images_evaluation"
_TURNS = 4


class Turned(Samples):
    """Images, each in four orientations: sample 4 i + q is image i turned by q quarters.

    Args:
        images: The images.
    """

    def __init__(self, images: FileSamples) -> None:
        self.images = images

    def __len__(self) -> int:
        return _TURNS * len(self.images)

    def sample(self, index: int, position: int) -> Batch:
        """One image, turned counter-clockwise."""
        inner, quarters = divmod(index, _TURNS)
        found = self.images.sample(inner, position)
        return {**found, "images": torch.rot90(found["images"], quarters, (-2, -1))}


def open_omniglot(config: OmniglotTasks, *, seed: int) -> Data:
    """Tasks over characters.

    Args:
        config: The ``data`` section.
        seed: What the tasks of the training are drawn from.

    Raises:
        DataError: a folder is missing or empty, a file is no image, a character is in both folders,
            or there are too few characters or drawings of one.
    """
    folder = existing(config.path)
    parts = [_part(folder / name, config) for name in (TRAIN, HELD_OUT)]
    facts = Facts(config.kind, channels=1, size=(config.size, config.size))
    (train, train_classes), (held_out, held_out_classes) = parts
    check_apart(folder, (TRAIN, train_classes), (HELD_OUT, held_out_classes))
    return assembled(config, facts, (train, held_out), (train_classes, held_out_classes), seed)


def _part(folder: Path, config: OmniglotTasks) -> tuple[Samples, dict[str, list[int]]]:
    need(
        folder.is_dir(),
        f"{folder.parent} has no folder {folder.name}",
        hint=f"unpack {folder.name}.zip beside the other one",
    )
    paths, labels, names = list[str](), list[int](), list[str]()
    for character in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        files = sorted(each.name for each in character.iterdir() if is_image(each.name))
        need(bool(files), f"{character} holds no images")
        place = character.relative_to(folder).as_posix()
        paths += [f"{place}/{name}" for name in files]
        labels += [len(names)] * len(files)
        names.append(place)
    need(bool(names), f"{folder} has no folders ALPHABET/CHARACTER with images")
    check_files(folder, paths, "headers", config.size)
    tensor = torch.tensor(labels)
    images = _opened(folder, paths, tensor, config.size)
    classes = by_class(tensor, names)
    if not config.rotations:
        return images, classes
    turned = {
        f"{name}, {90 * q}°": [_TURNS * index + q for index in indices]
        for name, indices in classes.items()
        for q in range(_TURNS)
    }
    return Turned(images), turned


def _opened(folder: Path, paths: list[str], labels: Tensor, size: int) -> Any:
    return FileSamples(folder, paths, labels, evaluation(size, "center"), channels=1, seed=0)
