"""Side-by-side timing: what is compared runs in turns, and each turn gives one paired ratio.

A machine that is busy, hot or throttled slows both sides of a turn alike, so the ratio of one turn
is far steadier than either time. The interval is of the median ratio, by bootstrap.
"""

from __future__ import annotations

import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 5_000


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios with the 95% interval of that median."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Timings:
    """Seconds of every case in every turn."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, case: str) -> float:
        """Median seconds of a case."""
        return statistics.median(self.seconds[case])

    def ratio(self, case: str, reference: str) -> Ratio:
        """Time of a case over that of another, turn by turn."""
        pairs = zip(self.seconds[case], self.seconds[reference], strict=True)
        ratios = [ours / theirs for ours, theirs in pairs]
        draw = random.Random(0)  # noqa: S311 - resampling needs no secrecy
        medians = sorted(
            statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
        )
        low, high = medians[round(0.025 * RESAMPLES)], medians[round(0.975 * RESAMPLES) - 1]
        return Ratio(statistics.median(ratios), low, high)


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    prepare: Callable[[], object] | None = None,
) -> Timings:
    """Time every case once per turn, in an order drawn anew each turn.

    Args:
        cases: Name → what to time.
        rounds: Turns that count.
        warmup: Turns before those.
        prepare: Called before each case, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    draw = random.Random(0)  # noqa: S311 - an order, not a secret
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            draw.shuffle(order)
            for name in order:
                if prepare is not None:
                    prepare()
                start = time.perf_counter()
                cases[name]()
                taken = time.perf_counter() - start
                if turn >= 0:
                    seconds[name].append(taken)
            gc.collect()
    finally:
        gc.enable()
    return Timings(seconds)


def both_clocks(
    cases: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, **options: Any
) -> tuple[Timings, Timings]:
    """Timings by the wall and by the CPU, which a busy machine lengthens less.

    Args:
        cases: As for ``interleave``.
        rounds: The same.
        warmup: The same.
        options: The others of ``interleave``.
    """
    cpu: dict[str, list[float]] = {name: [] for name in cases}

    def timed(name: str, call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            call()
            cpu[name].append(time.process_time() - start)

        return run

    noted = {name: timed(name, call) for name, call in cases.items()}
    wall = interleave(noted, rounds=rounds, warmup=warmup, **options)
    return wall, Timings({name: taken[-rounds:] for name, taken in cpu.items()})


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(name: str, text: str, data: Mapping[str, Any]) -> None:
    """Print a table and write it with its numbers to ``benchmarks/results``."""
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
    }
    print(text)
    print()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, **data}, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text + "\n")


def as_data(ratio: Ratio) -> dict[str, float]:
    """A ratio for JSON, rounded to what it means."""
    return {key: round(value, 4) for key, value in asdict(ratio).items()}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else platform.machine()
