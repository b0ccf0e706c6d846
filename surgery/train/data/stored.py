"""Samples of images: in memory, or decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.train.data.base import Batch, Place, Samples, positions
from surgery.train.data.configs import Channels
from surgery.train.data.images import decode
from surgery.train.data.transforms import Pipeline, to_sample

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageSamples(Samples):
    """Images with labels: {"images": float32 (C, H, W) in [-1, 1], "labels": int64 ()}.

    A kind of data implements ``image``.

    Args:
        labels: int64 (N,).
        pipeline: What is done to an image.
        seed: What augmentation is drawn from, beside the position of a sample.
    """

    def __init__(self, labels: Tensor, pipeline: Pipeline, seed: int) -> None:
        self.labels = labels
        self.pipeline = pipeline
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image | Tensor:
        """An image as it is stored."""

    @abstractmethod
    def take(self, indices: Tensor, pipeline: Pipeline) -> Self:
        """Some of the samples, under another pipeline.

        Args:
            indices: int64 (M,).
            pipeline: What is done to an image.
        """

    @abstractmethod
    def identity(self) -> str:
        """Text that is another one for other images or another order of them."""

    def sample(self, index: int, position: int) -> Batch:
        """One sample, augmented as its position says."""
        image = self.pipeline(self.image(index), self.seed, position)
        return {"images": image, "labels": self.labels[index]}


class MemorySamples(ImageSamples):
    """Images in memory.

    Args:
        images: uint8 (N, C, H, W), or float32 in [-1, 1].
        labels: int64 (N,).
        pipeline: What is done to an image.
        seed: What augmentation is drawn from.
    """

    def __init__(self, images: Tensor, labels: Tensor, pipeline: Pipeline, seed: int) -> None:
        super().__init__(labels, pipeline, seed)
        self.images = images

    def image(self, index: int) -> Tensor:
        """An image as it lies in memory."""
        return self.images[index]

    def take(self, indices: Tensor, pipeline: Pipeline) -> Self:
        """A copy of some of the samples."""
        return type(self)(self.images[indices], self.labels[indices], pipeline, self.seed)

    def identity(self) -> str:
        """A hash of every pixel."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(cast("Any", self.images.contiguous().flatten().view(torch.uint8).numpy()))
        return digest.hexdigest()

    def batch(self, places: Sequence[Place]) -> Batch:
        """Samples by one look into memory, unless each is to be augmented."""
        if self.pipeline.steps:
            return super().batch(places)
        chosen = torch.tensor([place.index for place in places])
        return {
            "images": to_sample(self.images[chosen]),
            "labels": self.labels[chosen],
            "position": positions(places),
        }


class FileSamples(ImageSamples):
    """Image files, decoded when they are asked for.

    Args:
        folder: What the paths are relative to.
        paths: N paths.
        labels: int64 (N,).
        pipeline: What is done to an image.
        channels: 1 or 3.
        seed: What augmentation is drawn from.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[str] | NDArray[np.bytes_],
        labels: Tensor,
        pipeline: Pipeline,
        *,
        channels: Channels,
        seed: int,
    ) -> None:
        super().__init__(labels, pipeline, seed)
        self.folder = folder
        # One array: each worker would otherwise copy a million strings as their counts change.
        self.paths = (
            paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(p) for p in paths])
        )
        self.channels: Channels = channels

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.folder / os.fsdecode(bytes(self.paths[index]))

    def image(self, index: int) -> Image:
        """Decode an image."""
        path = self.path(index)
        return decode(path, str(path), self.channels)

    def take(self, indices: Tensor, pipeline: Pipeline) -> Self:
        """Some of the files."""
        paths = self.paths[indices.numpy()]
        return type(self)(
            self.folder,
            paths,
            self.labels[indices],
            pipeline,
            channels=self.channels,
            seed=self.seed,
        )

    def identity(self) -> str:
        """A hash of the names and sizes of the files."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            size = self.path(index).stat().st_size
            digest.update(b"%s\0%d\0" % (bytes(self.paths[index]), size))
        return digest.hexdigest()
