"""The problems that the benchmarks of adaptation share: a learner and a batch of its tasks."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from surgery.train.adapt.config import AdaptConfig
from surgery.train.adapt.inner import Meta
from surgery.train.adapt.learner import Batch, Learner
from surgery.train.adapt.objective import example_of
from surgery.train.adapt.run import Adapting
from surgery.train.data.base import Place


def learner(name: str, *overrides: str) -> tuple[Learner, Adapting, Callable[[int], Batch]]:
    """A learner of a shipped configuration as it starts, its job, and batches of so many tasks."""
    return learner_of(AdaptConfig.load(name, overrides))


def learner_of(config: AdaptConfig) -> tuple[Learner, Adapting, Callable[[int], Batch]]:
    """The same of any configuration."""
    job = Adapting(config)
    data = job.data()
    made = Learner(config, data.facts, job.model(data), example_of(data))
    return made, job, lambda n: data.train.batch([Place(i, i) for i in range(n)])


def distance(one: Meta, other: Meta) -> float:
    """Euclidean distance over the length of ``other``."""
    pairs = [(a[n].double(), b[n].double()) for a, b in zip(one, other, strict=True) for n in b]
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    return apart / math.sqrt(sum(float(b.square().sum()) for _, b in pairs))


def peak_bytes(work: Callable[[], object]) -> int:
    """By how much the memory of a process grows at most while it works; measured in a fork.

    The kernel's mark of the highest resident set is reset first (proc(5), ``clear_refs``).
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(work, theirs))
    process.start()
    theirs.close()  # or a process that fails would never be missed
    found: int = ours.recv()
    process.join()
    assert process.exitcode == 0, "the measured process failed"
    return found


def _measured(work: Callable[[], object], answer: Connection) -> None:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    answer.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def as_number(value: Any) -> float:
    """A number for JSON, rounded to what it means."""
    return float(f"{float(value):.4g}")
