"""The handwritten digits that ship with scikit-learn, for runs without any download.

1797 grey images of 8 × 8 pixels with values from 0 to 16: the test part of the "Optical Recognition
of Handwritten Digits" data set of the UCI repository (https://doi.org/10.24432/C50P49).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from surgery.train.data.base import Data, Facts
from surgery.train.data.configs import DigitsData, ShiftedDigitsData
from surgery.train.data.libraries import require
from surgery.train.data.stored import MemorySamples
from surgery.train.data.transforms import evaluation, split, training

_SIDE = 8
_BLACK = -1.0


def open_digits(config: DigitsData, *, seed: int) -> Data:
    """The digits, split into a part to train on and a part to evaluate on.

    Args:
        config: The ``data`` section.
        seed: What augmentation is drawn from; the split does not depend on it.

    Raises:
        DataError: scikit-learn is not installed.
    """
    images, labels = _load()
    if config.size != _SIDE:
        images = _enlarged(images, config.size)
    images = images.expand(-1, config.channels, -1, -1).contiguous()
    size = (config.size, config.size)
    everything = MemorySamples(images, labels, evaluation(None, None), seed)
    train, held_out = split(labels, config.held_out)
    return Data(
        train=everything.take(train, training(size, None, config.augment, black=_BLACK)),
        held_out=everything.take(held_out, evaluation(None, None)),
        facts=Facts(
            kind=config.kind,
            channels=config.channels,
            size=size,
            classes=10,
            names=tuple(str(digit) for digit in range(10)),
        ),
    )


def open_shifted(config: ShiftedDigitsData, *, seed: int) -> Data:
    """The digits turned and inverted; the held-out part is halved into validation and test.

    Args:
        config: The ``data`` section.
        seed: As for ``open_digits``.

    Raises:
        DataError: scikit-learn is not installed.
    """
    plain = open_digits(DigitsData(**config.model_dump(include=_PLAIN)), seed=seed)
    train, held_out = (_shifted(each, config) for each in (plain.train, plain.held_out))
    order = torch.argsort(held_out.labels, stable=True)  # halves have equal parts of each class
    half = order[0 if config.part == "validation" else 1 :: 2].sort().values
    chosen = held_out.take(half, held_out.pipeline)
    return Data(train, chosen, replace(plain.facts, kind=config.kind))


_PLAIN = {"size", "channels", "augment", "held_out"}


def _shifted(samples: object, config: ShiftedDigitsData) -> MemorySamples:
    assert isinstance(samples, MemorySamples)  # noqa: S101 - the digits are in memory
    images = torch.rot90(samples.images, config.rotate, (-2, -1))
    images = -images if config.invert else images
    return MemorySamples(images.contiguous(), samples.labels, samples.pipeline, samples.seed)


def _load() -> tuple[Tensor, Tensor]:
    """Images float32 (1797, 1, 8, 8) in [-1, 1], labels int64 (1797,)."""
    datasets = require("sklearn.datasets", "the digits come with scikit-learn")
    loaded = datasets.load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    return images, torch.tensor(loaded.target, dtype=torch.int64)


def _enlarged(images: Tensor, size: int) -> Tensor:
    functional = require("torchvision.transforms.v2.functional", "enlarging digits")
    return functional.resize(images, [size, size], antialias=True)
