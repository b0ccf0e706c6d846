"""Carries the jobs of a conversion out: in threads, file by file finished, resumable."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery import progress
from surgery.checkpoints.sharded import Checkpoint
from surgery.conversion import streams
from surgery.conversion.jobs import Job, handle
from surgery.conversion.journal import Finished, Journal
from surgery.conversion.layout import OutFile
from surgery.errors import CheckpointError
from surgery.table import human_bytes

_CHUNK = 1 << 23
_PART = ".part"
#: What is left free on the disk beside the new files: the index, the log, a rounding.
_MARGIN = 1 << 24

Notes = Callable[[OutFile], Mapping[str, Any]]


class Stopped(Exception):
    """Another job failed, or the conversion was interrupted."""


class Engine:
    """Runs jobs.

    Args:
        checkpoint: The source.
        work: The folder to write in.
        journal: What is finished already; what is finished from now on is noted there.
        notes: What to note of a file that is finished.
        threads: How many jobs run at a time.

    Attributes:
        seconds: Stage → time that the threads spent in it: ``write`` (reading, computing, writing),
            ``flush`` (waiting for the disk), ``hash`` (reading the result back).
    """

    def __init__(
        self, checkpoint: Checkpoint, work: Path, journal: Journal, *, notes: Notes, threads: int
    ) -> None:
        self._checkpoint = checkpoint
        self._work = work
        self._journal = journal
        self._notes = notes
        self._threads = threads
        self._lock = threading.Lock()
        self._alone = threading.Lock()
        self._stop = threading.Event()
        self._sources: dict[Path, int] = {}
        self._targets: dict[OutFile, int] = {}
        self._pending: dict[OutFile, int] = {}
        self._meter: _Meter | None = None
        self.seconds: dict[str, float] = {"write": 0.0, "flush": 0.0, "hash": 0.0}

    def run(self, files: Sequence[OutFile], jobs: Iterable[Job]) -> None:
        """Write every file that is not finished yet.

        Raises:
            CheckpointError: the source changed; the disk has too little space.
            OSError: the disk is full, or cannot be written to.
        """
        missing = [file for file in files if file.name not in self._journal.finished]
        wanted = set(missing)
        chosen = [job for job in jobs if not wanted.isdisjoint(job.files())]
        total = sum(file.nbytes for file in missing)
        _check_space(self._work, total)
        for file in missing:
            self._pending[file] = sum(file in job.files() for job in chosen)
        with progress.task("converting", total, "bytes") as task:
            self._meter = _Meter(task)
            try:
                self._work_off(missing, chosen)
            finally:
                self._close()

    def _work_off(self, missing: Sequence[OutFile], jobs: Sequence[Job]) -> None:
        with ThreadPoolExecutor(self._threads, thread_name_prefix="convert") as pool:
            futures: list[Future[None]] = []
            futures += [pool.submit(self._end, f) for f in missing if not self._pending[f]]
            futures += [pool.submit(self._do, job) for job in jobs]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # After an error, and after an interrupt, nothing more is begun.
                if not all(each.done() for each in futures):
                    self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        errors = [e for each in futures if not each.cancelled() and (e := each.exception())]
        for error in errors:
            if not isinstance(error, Stopped):
                raise error

    def _do(self, job: Job) -> None:
        with self._alone if job.heavy else _nothing(), self._timed("write"):
            job.run(self)
        for file in job.files():
            if file.name not in self._journal.finished and self._is_last(file):
                self._end(file)

    def _is_last(self, file: OutFile) -> bool:
        with self._lock:
            self._pending[file] -= 1
            return self._pending[file] == 0

    def _end(self, file: OutFile) -> None:
        """Flush, hash and note a file whose tensors are all written."""
        target = self.target(file)
        with self._timed("flush"):
            os.fsync(target)
        with self._timed("hash"):
            digest, not_finite = _examined(target, file, self._check_stop)
        # What was read before is of use only if it is what it was at the start.
        self._checkpoint.check_unchanged()
        part = self._work / (file.name + _PART)
        part.rename(self._work / file.name)
        with self._lock:
            os.close(self._targets.pop(file))
            entry = Finished(file.nbytes, digest, not_finite, dict(self._notes(file)))
            self._journal.finish(file.name, entry)

    # -- what jobs ask for -----------------------------------------------------------------------

    def source(self, path: Path) -> int:
        """Handle of a file of the source."""
        with self._lock:
            if path not in self._sources:
                self._sources[path] = handle(path, os.O_RDONLY)
            return self._sources[path]

    def target(self, file: OutFile) -> int:
        """Handle of a file that is written; a finished one is written again to nowhere."""
        with self._lock:
            if file not in self._targets:
                self._targets[file] = self._opened(file)
            return self._targets[file]

    def advance(self, count: int) -> None:
        """Count bytes as written."""
        self._check_stop()
        with self._lock:
            if self._meter is not None:
                self._meter.advance(count)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _opened(self, file: OutFile) -> int:
        if file.name in self._journal.finished:
            return handle(Path(os.devnull), os.O_WRONLY)
        target = handle(self._work / (file.name + _PART), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        streams.write(target, memoryview(file.header), 0)
        os.truncate(target, file.nbytes)
        return target

    def _close(self) -> None:
        for each in (*self._sources.values(), *self._targets.values()):
            os.close(each)
        self._sources.clear()
        self._targets.clear()

    @contextmanager
    def _timed(self, stage: str) -> Generator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] += time.perf_counter() - begun


class _Meter:
    """Says in a task's note how fast it goes and how long it will take."""

    def __init__(self, task: progress.Task) -> None:
        self._task = task
        self._begun = time.monotonic()

    def advance(self, count: int) -> None:
        task = self._task
        elapsed = max(time.monotonic() - self._begun, 1e-6)
        rate = (task.done + count) / elapsed
        left = max((task.total or 0) - task.done - count, 0)
        minutes, seconds = divmod(round(left / max(rate, 1.0)), 60)
        task.note = f"{human_bytes(round(rate))}/s, {minutes}:{seconds:02d} left"
        task.advance(count)


@contextmanager
def _nothing() -> Generator[None]:
    yield


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    # What an interrupted conversion left half-written is written over.
    there = sum(each.stat().st_blocks * 512 for each in folder.glob(f"*{_PART}"))
    if free + there < wanted + _MARGIN:
        raise CheckpointError(
            f"the disk of {folder.parent} has {human_bytes(free)} free, and "
            f"{human_bytes(wanted)} are to be written",
            hint="free some space, or give a folder on another disk",
        )


def _examined(
    target: int, file: OutFile, check_stop: Callable[[], None]
) -> tuple[str, dict[str, int]]:
    """The SHA-256 of a written file, and its tensors with values that are NaN or infinite."""
    digest = sha256(os.pread(target, len(file.header), 0))
    buffer = torch.empty(_CHUNK, dtype=torch.uint8)
    not_finite: dict[str, int] = {}
    for name, tensor in file.tensors:
        at, left = file.starts[name], tensor.numel() * tensor.element_size()
        while left:
            check_stop()
            piece = buffer[: min(_CHUNK, left)]
            streams.read(target, piece, at, Path(file.name))
            digest.update(streams.view(piece))
            bad = _not_finite(piece.view(tensor.dtype))
            if bad:
                not_finite[name] = not_finite.get(name, 0) + bad
            at, left = at + len(piece), left - len(piece)
    return digest.hexdigest(), not_finite


def _not_finite(values: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not values.is_floating_point():
        return 0
    # Kernels for the narrow formats are few; those with two bytes have all.
    wide = values.to(torch.float32) if values.dtype.itemsize == 1 else values
    total = wide.sum(dtype=torch.promote_types(wide.dtype, torch.float32))
    # One pass without temporaries: a sum is finite only if all its terms are.
    if bool(torch.isfinite(total)):
        return 0
    return int((~torch.isfinite(wide)).sum())
