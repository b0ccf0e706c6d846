"""N-way K-shot episodes over a pool of labelled samples.

An episode is a function of the seed and of its number alone: a resumed run goes on with the
episodes that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.train.adapt.tasks.configs import Episode
from surgery.train.data.base import Batch, Place, Samples, need, positions

#: An epoch has no meaning for tasks that are drawn; this many are counted as one.
EPOCH = 1_000_000
#: Held-out tasks are the same whatever a run's seed is.
HELD_OUT_SEED = 0

SUPPORT, QUERY = "support.", "query."


class Episodes(Samples):
    """Tasks of classification.

    A batch of B tasks has, for every tensor of the pool's samples, ``support.NAME`` of shape
    (B, ways·shots, ...) and ``query.NAME`` (B, ways·queries, ...), class by class. Labels are
    0 to ways - 1, in the order in which a task's classes are drawn.

    Args:
        pool: Labelled samples.
        classes: Name → indices of its samples in the pool.
        shape: Ways, shots and queries.
        seed: What tasks are drawn from, beside their number.
        count: How many tasks an epoch has.

    Raises:
        DataError: there are fewer classes than ways, or fewer samples of one than shots and
            queries.
    """

    def __init__(
        self,
        pool: Samples,
        classes: Mapping[str, Sequence[int]],
        shape: Episode,
        *,
        seed: int,
        part: str,
        count: int = EPOCH,
    ) -> None:
        self.pool = pool
        self.names = tuple(classes)
        self.members: list[NDArray[np.int64]] = [
            np.asarray(indices, dtype=np.int64) for indices in classes.values()
        ]
        self.shape = shape
        self.seed = seed
        self.count = count
        check_shape(classes, shape, part)

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, position: int) -> Batch:
        """One task, without its position."""
        batch = self.batch([Place(index, position)])
        return {name: tensor[0] for name, tensor in batch.items() if name != "position"}

    def batch(self, places: Sequence[Place]) -> Batch:
        """Tasks side by side; texts of all of them are padded alike."""
        drawn = np.stack([self.drawn(place.position) for place in places])
        flat = drawn.reshape(-1)
        first = places[0].position * drawn[0].size
        # Augmentation is drawn from a sample's own position in the whole training.
        read = self.pool.batch([Place(int(i), first + n) for n, i in enumerate(flat)])
        found: Batch = {"position": positions(places)}
        for name, tensor in read.items():
            if name != "position":
                found |= self._parted(name, tensor.reshape(*drawn.shape, *tensor.shape[1:]))
        return found | self._labels(len(places))

    def drawn(self, position: int) -> NDArray[np.int64]:
        """Indices of a task's samples: (ways, shots + queries), the support first."""
        draw = np.random.default_rng([self.seed, position])
        chosen = draw.permutation(len(self.members))[: self.shape.ways]
        size = self.shape.shots + self.shape.queries
        rows = [draw.permutation(self.members[int(c)])[:size] for c in chosen]
        return np.stack(rows)

    def _parted(self, name: str, tensor: Tensor) -> Batch:
        """Support and query of (B, ways, shots + queries, ...)."""
        shots = self.shape.shots
        support, query = tensor[:, :, :shots], tensor[:, :, shots:]
        return {SUPPORT + name: support.flatten(1, 2), QUERY + name: query.flatten(1, 2)}

    def _labels(self, tasks: int) -> Batch:
        ways = torch.arange(self.shape.ways)
        counts = {SUPPORT: self.shape.shots, QUERY: self.shape.queries}
        return {
            f"{part}labels": ways.repeat_interleave(count).expand(tasks, -1).contiguous()
            for part, count in counts.items()
        }


def check_shape(classes: Mapping[str, Sequence[int]], shape: Episode, part: str) -> None:
    """Refuse tasks that the classes cannot fill.

    Raises:
        DataError: with the figures.
    """
    need(
        len(classes) >= shape.ways,
        f"a task has {shape.ways} ways, and there are {len(classes)} {part} classes",
        hint="lower data.ways, or hold out more or fewer classes",
    )
    size = shape.shots + shape.queries
    for name, indices in classes.items():
        need(
            len(indices) >= size,
            f"a task has {shape.shots} shots and {shape.queries} queries of each class, and "
            f"{part} class {name} has {len(indices)} samples",
            hint="lower data.shots or data.queries, or remove the class",
        )


def check_apart(folder: Path, *parts: tuple[str, Iterable[str]]) -> None:
    """Refuse classes that are both trained on and held out.

    Args:
        folder: What an error names.
        parts: The two parts, by name, with the names of what must be in one of them only.

    Raises:
        DataError: with some of them.
    """
    (one, ours), (other, theirs) = parts
    both = sorted({*ours} & {*theirs})
    need(
        not both,
        f"{folder}: {len(both)} are in both {one} and {other}, such as {', '.join(both[:1])}",
        hint="what is held out must not be trained on: remove it from one of them",
    )


def by_class(labels: Tensor, names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of the samples of each class.

    Args:
        labels: int64 (N,), indices into ``names``.
        names: What the classes are called.
    """
    found: dict[str, list[int]] = {name: [] for name in names}
    for index, label in enumerate(cast("list[int]", labels.tolist())):  # pyright: ignore[reportUnknownMemberType]
        found[names[label]].append(index)
    return found


def divided(
    classes: Mapping[str, Sequence[int]], held_out: float | Sequence[str]
) -> tuple[dict[str, Sequence[int]], dict[str, Sequence[int]]]:
    """Classes to train on, and those to evaluate on: no class is in both.

    Args:
        classes: Name → indices.
        held_out: Names, or a part of them, rounded and taken from the end.

    Raises:
        DataError: a name is unknown or given twice.
    """
    names = list(classes)
    if isinstance(held_out, int | float):
        count = min(max(round(held_out * len(names)), 1), len(names) - 1)
        chosen = set(names[len(names) - count :])
    else:
        unknown = [name for name in held_out if name not in classes]
        need(
            not unknown,
            f"data.held_out names classes that do not exist: {', '.join(unknown)}",
            hint=f"the classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}",
        )
        chosen = set(held_out)
        need(len(chosen) == len(held_out), "data.held_out names a class twice")
    train = {name: indices for name, indices in classes.items() if name not in chosen}
    return train, {name: indices for name, indices in classes.items() if name in chosen}
