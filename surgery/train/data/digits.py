"""The handwritten digits that ship with scikit-learn, for runs without any download.

1797 grey images of 8 × 8 pixels with values from 0 to 16: the test part of the "Optical Recognition
of Handwritten Digits" data set of the UCI repository (https://doi.org/10.24432/C50P49).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from surgery.errors import DataError
from surgery.train.data.base import Data, Facts
from surgery.train.data.configs import DigitsData
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


def _load() -> tuple[Tensor, Tensor]:
    """Images float32 (1797, 1, 8, 8) in [-1, 1], labels int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the digits come with scikit-learn, which is not installed",
            hint="pip install 'model-surgery[train]'",
        ) from None
    loaded = cast("Any", load_digits())
    images = torch.from_numpy(loaded.images).to(torch.float32).unsqueeze(1) / 8.0 - 1.0
    return images, torch.from_numpy(loaded.target).to(torch.int64)


def _enlarged(images: Tensor, size: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.resize(images, [size, size], antialias=True)
