"""The order in which stored samples are seen.

The samples of all epochs stand in one endless row. Epoch e is a permutation seeded by (seed, e),
and the batch of step s is the part [s·batch, (s+1)·batch) of the row; a batch may begin in one
epoch and end in the next. To resume is to start at another step: nothing else is to be saved.

Accelerate gives each rank its part of every batch (``split_batches``), so that the samples of a
step do not depend on the number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from surgery.train.data.base import Place, need


class Order(Sampler[list[Place]]):
    """Batches of a training run, without end.

    Args:
        count: How many samples there are.
        batch: Samples in a batch, over all ranks.
        seed: What the permutations are drawn from, beside the number of the epoch.
        start: Number of the first batch.

    Attributes:
        batch_size: What ``batch`` is called by torch and accelerate.

    Raises:
        DataError: there are no samples, or another number is out of range.
    """

    def __init__(self, count: int, *, batch: int, seed: int, start: int = 0) -> None:
        _check(count, batch)
        need(seed >= 0, f"the order of samples has the seed {seed}, expected 0 or more")
        need(start >= 0, f"the order of samples starts at batch {start}, expected 0 or more")
        self.count = count
        self.batch_size = batch
        self.seed = seed
        self.start = start
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[Place]]:
        for step in itertools.count(self.start):
            yield self.places(step)

    def places(self, step: int) -> list[Place]:
        """The batch of one step."""
        position = step * self.batch_size
        left = self.batch_size
        found: list[Place] = []
        while left:
            epoch, offset = divmod(position, self.count)
            indices = self._indices(epoch)[offset : offset + left].tolist()
            found.extend(map(Place, indices, range(position, position + len(indices))))
            position += len(indices)
            left -= len(indices)
        return found

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Samples in the order of one epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def _indices(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self.permutation(epoch)
        return self._permutation


class Sweep(Sampler[list[Place]]):
    """Every sample once, from the first to the last; the last batch may be smaller.

    Args:
        count: How many samples there are.
        batch: Samples in a batch, over all ranks.

    Attributes:
        batch_size: What ``batch`` is called by torch and accelerate.

    Raises:
        DataError: there are no samples, or no samples in a batch.
    """

    def __init__(self, count: int, *, batch: int) -> None:
        _check(count, batch)
        self.count = count
        self.batch_size = batch

    def __iter__(self) -> Iterator[list[Place]]:
        for first in range(0, self.count, self.batch_size):
            last = min(first + self.batch_size, self.count)
            yield [Place(index, index) for index in range(first, last)]

    def __len__(self) -> int:
        return (self.count + self.batch_size - 1) // self.batch_size


def _check(count: int, batch: int) -> None:
    need(count >= 1, "there are no samples to put in order")
    need(batch >= 1, f"a batch has {batch} samples, expected 1 or more")
