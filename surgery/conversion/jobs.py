"""The pieces of work of a conversion, each with the memory of a few rows or of one tensor."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from surgery.checkpoints.sharded import Located
from surgery.conversion import streams
from surgery.conversion.layout import OutFile, Spot

#: Elements that are changed at a time: with copies in float32 they stay in the caches of a core.
_ELEMENTS = 1 << 18


class Desk(Protocol):
    """What a job reads from and writes to."""

    def source(self, path: Path) -> int:
        """Handle of a file of the source."""
        ...

    def target(self, file: OutFile) -> int:
        """Handle of a file that is written."""
        ...

    def advance(self, count: int) -> None:
        """Count bytes as written; raises if the conversion is to stop."""
        ...


class Job(ABC):
    """A piece of work."""

    #: Whether it needs several times the memory of its tensor; such jobs run one by one.
    heavy: bool = False

    @abstractmethod
    def files(self) -> frozenset[OutFile]:
        """The files that it writes to."""

    @abstractmethod
    def run(self, desk: Desk) -> None:
        """Do it. Doing it again writes the same."""


@dataclass(frozen=True)
class Copy(Job):
    """Bytes that stay as they are.

    Attributes:
        path: The file of the source.
        start: First byte in it.
        stop: Byte behind the last.
        spot: Where they go.
    """

    path: Path
    start: int
    stop: int
    spot: Spot

    def files(self) -> frozenset[OutFile]:
        """The one it writes to."""
        return frozenset({self.spot.file})

    def run(self, desk: Desk) -> None:
        """Copy in the kernel."""
        source, target = desk.source(self.path), desk.target(self.spot.file)
        place = {"start": self.start, "stop": self.stop, "at": self.spot.start}
        for count in streams.copy(source, target, **place, path=self.path):
            desk.advance(count)

    def follows(self, other: Job) -> bool:
        """Whether it goes on exactly where another copy ends, in both files."""
        return (
            isinstance(other, Copy)
            and (other.path, other.stop, other.spot.file) == (self.path, self.start, self.spot.file)
            and other.spot.start + other.stop - other.start == self.spot.start
        )


#: Rows ``(n, columns)`` of a stored tensor, the number of the first, and room of the same shape in
#: float32 at least → what becomes of them, in that room or elsewhere.
Change = Callable[[Tensor, int, Tensor], Tensor]


@dataclass(frozen=True)
class Rows(Job):
    """A tensor that is changed, or cast, a few rows at a time.

    Attributes:
        located: The tensor in the source.
        spot: Where the result goes, of the same shape.
        dtype: Of the result.
        columns: Elements per row, as ``change`` reads it.
        change: What becomes of rows; None to cast only.
    """

    located: Located
    spot: Spot
    dtype: torch.dtype
    columns: int
    change: Change | None = None

    def files(self) -> frozenset[OutFile]:
        """The one it writes to."""
        return frozenset({self.spot.file})

    @torch.no_grad()
    def run(self, desk: Desk) -> None:
        """Read, change, cast and write, chunk by chunk."""
        slot = self.located.slot
        source, target = desk.source(self.located.file), desk.target(self.spot.file)
        rows = slot.nbytes // slot.dtype.itemsize // self.columns
        step = max(1, _ELEMENTS // self.columns)
        # One memory for all chunks: the system clears new memory page by page, which costs more
        # than what is computed in it.
        shape = (min(step, rows), self.columns)
        buffer = torch.empty(shape, dtype=slot.dtype)
        wide = torch.empty(shape, dtype=max(slot.dtype, torch.float32, key=lambda d: d.itemsize))
        cast = torch.empty(shape, dtype=self.dtype)
        row_in = self.columns * slot.dtype.itemsize
        row_out = self.columns * self.dtype.itemsize
        asked = slot.start
        for first in range(0, rows, step):
            at = slot.start + first * row_in
            if at >= asked:
                # One stretch is read by the disk while the one before it is worked on.
                ahead = min(at + 2 * streams.AHEAD, slot.end)
                streams.expect(source, asked, ahead - asked)
                asked = at + streams.AHEAD
            count = min(step, rows - first)
            part, room = buffer[:count], wide[:count]
            streams.read(source, part, at, self.located.file)
            if self.change is not None:
                made = self.change(part, first, room)
            else:
                made = room.copy_(part) if _by_way_of_float32(part.dtype, self.dtype) else part
            data = streams.view(cast[:count].copy_(made))
            streams.write(target, data, self.spot.start + first * row_out)
            desk.advance(len(data))


@dataclass(frozen=True)
class Whole(Job):
    """Tensors that are made in one go.

    Attributes:
        make: Gives them by the keys of ``spots``.
        spots: Where each goes.
        heavy: Whether it needs several times the memory of its tensors.
    """

    make: Callable[[], Mapping[str, Tensor]]
    spots: Mapping[str, Spot]
    heavy: bool = False

    def files(self) -> frozenset[OutFile]:
        """Those it writes to."""
        return frozenset(spot.file for spot in self.spots.values())

    @torch.no_grad()
    def run(self, desk: Desk) -> None:
        """Make them, and write each."""
        made = self.make()
        for name, spot in self.spots.items():
            data = streams.view(made[name].detach().contiguous())
            streams.write(desk.target(spot.file), data, spot.start)
            desk.advance(len(data))


def _by_way_of_float32(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast is faster in two steps: between the half formats it is."""
    return {source, target} == {torch.bfloat16, torch.float16}


def joined(jobs: Iterable[Job]) -> list[Job]:
    """Jobs with copies of neighbouring bytes made one."""
    found: list[Job] = []
    for job in jobs:
        last = found[-1] if found else None
        if isinstance(job, Copy) and isinstance(last, Copy) and job.follows(last):
            found[-1] = Copy(last.path, last.start, job.stop, last.spot)
        else:
            found.append(job)
    return found


def handle(path: Path, flags: int) -> int:
    """Open a file that is read or written at positions; closed with ``os.close``."""
    return os.open(path, flags | os.O_CLOEXEC, 0o666)
