"""ImageNet (arXiv 1409.0575) as folders, and whatever else is laid out that way.

``train/n01440764/n01440764_10026.JPEG`` and ``val/n01440764/ILSVRC2012_val_00000293.JPEG``: a
folder per WordNet id, whose sorted order numbers the classes.
"""

from __future__ import annotations

from pathlib import Path

from surgery.errors import DataError
from surgery.train.data import images
from surgery.train.data.base import Data, Facts
from surgery.train.data.configs import ImagenetData
from surgery.train.data.folder import Listing, by_class, existing
from surgery.train.data.stored import FileSamples
from surgery.train.data.transforms import evaluation, training


def open_imagenet(config: ImagenetData, *, seed: int) -> Data:
    """Two folders of images: one to train on, one to evaluate on.

    Args:
        config: The ``data`` section.
        seed: What augmentation is drawn from.

    Raises:
        DataError: a folder is missing or empty, the two have different classes, or a file cannot
            be decoded.
    """
    root = existing(config.path)
    train_folder, held_out_folder = _part(root, "train"), _part(root, config.held_out)
    train, held_out = by_class(train_folder), _held_out(held_out_folder)
    _compare(train_folder, train, held_out_folder, held_out)
    if config.check != "none":
        images.check_files(train_folder, train.paths, config.check, config.size)
        images.check_files(held_out_folder, held_out.paths, config.check, config.size)
    shape = (config.size, config.size)
    return Data(
        train=FileSamples(
            train_folder,
            train.paths,
            train.labels,
            training(shape, config.fit, config.augment),
            channels=config.channels,
            seed=seed,
        ),
        held_out=FileSamples(
            held_out_folder,
            held_out.paths,
            held_out.labels,
            evaluation(config.size, config.fit),
            channels=config.channels,
            seed=seed,
        ),
        facts=Facts(
            kind=config.kind,
            channels=config.channels,
            size=shape,
            classes=len(train.classes or ()),
            names=train.classes,
        ),
    )


def _part(root: Path, name: str) -> Path:
    folder = root / name
    if folder.is_dir():
        return folder
    there = sorted(each.name for each in root.iterdir() if each.is_dir())
    raise DataError(
        f"{root} has no folder {name}/; it has {', '.join(there[:5]) or 'no folders'}",
        hint="expected train/CLASS/ and val/CLASS/; for one folder of classes use kind: folder",
    )


def _held_out(folder: Path) -> Listing:
    flat = not any(each.is_dir() for each in folder.iterdir())
    if flat and any(images.is_image(each.name) for each in folder.iterdir()):
        raise DataError(
            f"{folder} holds its images flat, as the published archive does",
            hint="sort them into a folder per class first, as the devkit's ground truth says",
        )
    return by_class(folder)


def _compare(one: Path, train: Listing, other: Path, held_out: Listing) -> None:
    if train.classes == held_out.classes:
        return
    different = sorted(set(train.classes or ()) ^ set(held_out.classes or ()))
    home = one if different[0] in set(train.classes or ()) else other
    raise DataError(
        f"{one} and {other} have different classes, {len(different)} are in one of them only, "
        f"such as {different[0]}/ in {home}",
        hint="both need the same class folders",
    )
