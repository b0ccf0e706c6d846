"""Tasks drawn from labelled data of any kind, and from arrays."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.errors import DataError
from surgery.train.adapt.tasks.configs import ArrayTasks, Episode, LabelledTasks
from surgery.train.adapt.tasks.episodes import HELD_OUT_SEED, Episodes, by_class, divided
from surgery.train.data.base import Data, Facts, Samples, need
from surgery.train.data.records import TextSamples
from surgery.train.data.stored import FileSamples, ImageSamples, MemorySamples
from surgery.train.data.transforms import evaluation


def open_labelled(config: LabelledTasks, *, seed: int) -> Data:
    """Tasks over the classes of labelled data.

    Args:
        config: The ``data`` section.
        seed: What the tasks of the training, and augmentation, are drawn from.

    Raises:
        DataError: the data has no classes, or too few of them or of their samples.
    """
    from surgery.train.data import open_data

    opened = open_data(config.source, seed=seed)
    names = opened.facts.names
    if names is None:
        raise DataError(
            f"{config.source.kind} data has no classes to draw tasks from",
            hint="name the column of the classes: data.source.label; or use folders of images",
        )
    train, held_out = _pools(opened)
    classes = by_class(_labels(train), names)
    return assembled(
        config, opened.facts, (train, held_out), divided(classes, config.held_out), seed
    )


def open_arrays(config: ArrayTasks, *, seed: int) -> Data:
    """Tasks over arrays of images.

    Args:
        config: The ``data`` section.
        seed: What the tasks of the training are drawn from.

    Raises:
        DataError: the file is missing or broken, an array is missing or has another shape, or
            there are too few classes or samples of them.
    """
    images, labels = _arrays(Path(config.path).expanduser())
    found = sorted({int(label) for label in labels})
    names = [str(label) for label in found]
    indices = torch.tensor([found.index(int(label)) for label in labels])
    pool = MemorySamples(images, indices, evaluation(None, None), seed)
    held_out = config.held_out
    chosen = held_out if isinstance(held_out, int | float) else [str(label) for label in held_out]
    facts = Facts(config.kind, channels=images.shape[1], size=(images.shape[2], images.shape[3]))
    return assembled(config, facts, (pool, pool), divided(by_class(indices, names), chosen), seed)


def assembled(
    config: Episode,
    facts: Facts,
    pools: tuple[Samples, Samples],
    classes: tuple[Mapping[str, Sequence[int]], Mapping[str, Sequence[int]]],
    seed: int,
) -> Data:
    """Data of tasks over two pools and their classes.

    Args:
        config: Ways, shots and queries.
        facts: What a sample is.
        pools: What is trained and what is evaluated on.
        classes: Of each pool, name → indices.
        seed: What the tasks of the training are drawn from.
    """
    train = Episodes(pools[0], classes[0], config, seed=seed, part="training")
    held_out = Episodes(pools[1], classes[1], config, seed=HELD_OUT_SEED, part="held-out")
    note = f"classes: {len(train.names)} to train on, {len(held_out.names)} held out"
    return Data(train, held_out, replace(facts, classes=config.ways, names=None), (note,))


def _pools(opened: Data) -> tuple[Samples, Samples]:
    """All samples twice: as they are trained on, and as they are evaluated on."""
    train, held_out = opened.train, opened.held_out
    if isinstance(train, TextSamples) and isinstance(held_out, TextSamples):
        framed = [*train.framed, *held_out.framed]
        assert train.classes is not None and held_out.classes is not None  # noqa: S101, PT018 - they have names
        pool = TextSamples(framed, torch.cat([train.classes, held_out.classes]), train.pad)
        return pool, pool
    if isinstance(train, MemorySamples) and isinstance(held_out, MemorySamples):
        images = torch.cat([train.images, held_out.images])
        labels = torch.cat([train.labels, held_out.labels])
        pool = MemorySamples(images, labels, held_out.pipeline, held_out.seed)
        return replace_pipeline(pool, train), pool
    if isinstance(train, FileSamples) and isinstance(held_out, FileSamples):
        paths: NDArray[np.bytes_] = np.concatenate([train.paths, held_out.paths])
        labels = torch.cat([train.labels, held_out.labels])
        pool = FileSamples(
            train.folder,
            paths,
            labels,
            held_out.pipeline,
            channels=train.channels,
            seed=held_out.seed,
        )
        return replace_pipeline(pool, train), pool
    raise DataError(f"tasks cannot be drawn from {type(train).__name__}")


def replace_pipeline(pool: ImageSamples, like: ImageSamples) -> ImageSamples:
    """A pool under the pipeline of other samples."""
    return pool.take(torch.arange(len(pool)), like.pipeline)


def _labels(pool: Samples) -> Tensor:
    if isinstance(pool, TextSamples):
        assert pool.classes is not None  # noqa: S101 - as in _pools
        return pool.classes
    return cast("ImageSamples", pool).labels


#: What NumPy raises for a file that is cut short or damaged.
_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def _read(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and labels of an archive, as they are."""
    try:
        # Opened here: NumPy leaves a file open whose archive is damaged.
        with path.open("rb") as file:
            opened = np.load(file, allow_pickle=False)
            need(
                isinstance(opened, np.lib.npyio.NpzFile),
                f"{path} holds one array, expected an archive with images and labels",
                hint="write it with numpy.savez(path, images=..., labels=...)",
            )
            missing = [name for name in ("images", "labels") if name not in opened]
            need(not missing, f"{path} has no array {' and no array '.join(missing)}")
            return opened["images"], opened["labels"]
    except _DAMAGED as error:
        raise DataError(
            f"{path} cannot be read as .npz: {error}",
            hint="write it with numpy.savez(path, images=..., labels=...)",
        ) from None


def _arrays(path: Path) -> tuple[Tensor, NDArray[np.int64]]:
    """Images uint8 or float32 (N, C, H, W), and labels (N,)."""
    need(path.is_file(), f"there is no file {path}", hint="a path starts at the working folder")
    images, labels = _read(path)
    if images.ndim == 3:
        images = images[:, None]
    need(
        images.ndim == 4 and images.size > 0,
        f"{path}: images have the shape {images.shape}, expected (N, C, H, W) or (N, H, W)",
    )
    need(
        labels.shape == (len(images),) and np.issubdtype(labels.dtype, np.integer),
        f"{path}: labels are {labels.dtype} {labels.shape}, expected integers ({len(images)},)",
    )
    if images.dtype != np.uint8:
        need(
            np.issubdtype(images.dtype, np.floating) and bool(np.abs(images).max() <= 1),
            f"{path}: images are {images.dtype}, expected uint8, or floating point in [-1, 1]",
        )
        images = images.astype(np.float32)
    return torch.from_numpy(images), labels.astype(np.int64)  # pyright: ignore[reportUnknownMemberType]
