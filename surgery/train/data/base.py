"""What every kind of data is made of: samples, and the facts a model must fit.

Samples are either stored, so that any of them can be asked for by number, or streamed, so that
they come one after the other. Either way a batch carries ``position``: the number of each of its
samples, counted from the start of training through all epochs. Whatever is random about a sample
is drawn from the seed and this number, so that neither a resume nor the number of ranks changes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from surgery.errors import DataError

if TYPE_CHECKING:
    from surgery.train.data.tokenizer import Tokenizer

#: Tensors by name. Those of a batch have one more axis in front, the sample's.
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """One sample of a batch: which one it is, and the how-manieth of the whole training."""

    index: int
    position: int


class Samples(Dataset[Batch], ABC):
    """Stored samples. Any of them can be read at any time, from any process.

    A kind of data implements ``__len__`` and ``sample``, and ``batch`` where it can read many at
    once faster than one by one.
    """

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def sample(self, index: int, position: int) -> Batch:
        """One sample, without its position.

        Args:
            index: From 0 to ``len(self) - 1``.
            position: What randomness, such as augmentation, is drawn from beside a seed.
        """

    def batch(self, places: Sequence[Place]) -> Batch:
        """Samples stacked along a new first axis, and ``position`` of shape (B,), int64."""
        samples = [self.sample(place.index, place.position) for place in places]
        stacked = {key: torch.stack([each[key] for each in samples]) for key in samples[0]}
        return stacked | {"position": positions(places)}

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(index, index)

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        # What torch's DataLoader calls with all that a batch sampler yields at once.
        return self.batch(places)


class Spread(Samples):
    """Some of the samples, at equal distances.

    Args:
        samples: Where they come from.
        count: How many; all of them where there are fewer.
    """

    def __init__(self, samples: Samples, count: int) -> None:
        self.samples = samples
        self.count = min(count, len(samples))

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, position: int) -> Batch:
        """The sample at ``index`` of the chosen ones."""
        return self.samples.sample(self._source(index), position)

    def batch(self, places: Sequence[Place]) -> Batch:
        """A batch of the chosen ones."""
        return self.samples.batch(
            [Place(self._source(place.index), place.position) for place in places]
        )

    def _source(self, index: int) -> int:
        return index * len(self.samples) // self.count


class StreamSamples(IterableDataset[Batch], ABC):
    """Samples that come one after the other without end, each with its ``position``, shape ().

    Attributes:
        start: Position of the first sample that comes.
    """

    start: int

    @abstractmethod
    def at(self, position: int) -> Self:
        """The same stream from a later sample on."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Samples from ``start`` on."""


@dataclass(frozen=True)
class Facts:
    """What a model must fit.

    Attributes:
        kind: Kind of the data, as in the configuration.
        vocab_size: Token ids are below it.
        length: Tokens in a sample.
        channels: Channels of an image or a latent.
        size: Height and width of an image or a latent.
        classes: Labels are below it; None for data without labels.
        tokenizer: Turns token ids into text.
        names: What the classes are called.
        longest: Tokens in the longest sample, where samples differ in length.
    """

    kind: str
    vocab_size: int | None = None
    length: int | None = None
    channels: int | None = None
    size: tuple[int, int] | None = None
    classes: int | None = None
    tokenizer: Tokenizer | None = None
    names: tuple[str, ...] | None = None
    longest: int | None = None


@dataclass(frozen=True)
class Data:
    """Opened data.

    Attributes:
        train: What is trained on.
        held_out: What is evaluated on; nothing of it is in ``train``.
        facts: What a model must fit.
        notes: What there is to know about it before it is trained on, in sentences.
    """

    train: Samples | StreamSamples
    held_out: Samples
    facts: Facts
    notes: tuple[str, ...] = ()


def positions(places: Sequence[Place]) -> Tensor:
    """Positions of the samples of a batch: int64, shape (B,)."""
    return torch.tensor([place.position for place in places], dtype=torch.int64)


def need(condition: bool, message: str, *, hint: str | None = None) -> None:
    """Raise a ``DataError`` unless the condition holds."""
    if not condition:
        raise DataError(message, hint=hint)
