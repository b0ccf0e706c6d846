"""Memory, time and error of a meta-gradient: the binomial expansion against full unrolling.

    python benchmarks/adaptation/speed.py             # a few minutes on one core

One task of handwritten digits (5-way 5-shot, 15 queries of each class, four convolutions of 32
filters), step size 0.01, K = 5, 10 and 20 inner steps. Peak memory is by how much the process
grows, measured in a fork for each cell. Below it, tasks side by side with vmap against a loop over
them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]

from harness import as_data, interleave, report, table  # noqa: E402
from problems import as_number, distance, learner, peak_bytes  # noqa: E402

from surgery.table import human_bytes  # noqa: E402
from surgery.train.adapt.estimators import (  # noqa: E402
    Binomial,
    Estimator,
    FirstOrder,
    Truncated,
    Unrolled,
)
from surgery.train.adapt.learner import Learner, one, split  # noqa: E402

ESTIMATORS: dict[str, Estimator] = {
    "unrolled": Unrolled(),
    "binomial, L = 1": Binomial(1),
    "binomial, L = 2": Binomial(2),
    "binomial, L = 3": Binomial(3),
    "truncated, L = 3": Truncated(3),
    "first order": FirstOrder(),
}
REFERENCE = "unrolled"


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    rows, data = list[list[str]](), dict[str, Any]()
    for steps in args.steps:
        for name, cell in cells(steps, args.rounds).items():
            rows.append([str(steps), name, *texts(cell)])
            data[f"K = {steps}, {name}"] = cell
    if len(args.steps) > 1:
        check(data, args.steps)
    header = ["K", "estimator", "peak memory", "time", "over unrolled", "error"]
    mapped = {name: vmapped(name, args.rounds) for name in ("sinusoid-maml", "digits-maml")}
    lines = [
        f"vmap over tasks against a loop, time of a meta-gradient: {name} {cell['ratio']['median']}"
        f" [{cell['ratio']['low']}, {cell['ratio']['high']}]"
        for name, cell in mapped.items()
    ]
    text = "\n".join([table(header, rows), "", *lines])
    report("adaptation_speed", text, {"cells": data, "vmap": mapped})


def cells(steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Every estimator at so many inner steps."""
    overrides = ("data.shots=5", "inner.lr=0.01", f"inner.steps={steps}")
    made, _, batches = learner("digits-maml", *overrides)
    batch = batches(1)
    work = {name: partial(gradient, made, each, batch) for name, each in ESTIMATORS.items()}
    peaks = {name: peak_bytes(each) for name, each in work.items()}
    found = {name: each() for name, each in work.items()}
    timings = interleave(work, rounds=rounds, warmup=0)
    return {
        name: {
            "peak_bytes": peaks[name],
            "seconds": as_number(timings.median(name)),
            "ratio": as_data(timings.ratio(name, REFERENCE)),
            "error": as_number(distance(each, found[REFERENCE])),
        }
        for name, each in found.items()
    }


def gradient(made: Learner, estimator: Estimator, batch: Any) -> Any:
    with made.mode(training=True):
        task = one(split(batch, torch.float32), 0)
        return estimator(made.problem, made.meta(), task).gradient


def vmapped(name: str, rounds: int) -> dict[str, Any]:
    """Tasks side by side over tasks one by one."""
    work: dict[str, Callable[[], object]] = {}
    for how in ("loop", "vmap"):
        made, _, batches = learner(name, f'inner.parallel="{how}"')
        work[how] = partial(made.estimated, batches(made.config.train.batch))
    timings = interleave(work, rounds=rounds, warmup=1)
    return {
        "tasks": learner(name)[0].config.train.batch,
        "seconds": {how: as_number(timings.median(how)) for how in work},
        "ratio": as_data(timings.ratio("vmap", "loop")),
    }


def check(data: dict[str, Any], steps: list[int]) -> None:
    """What is claimed: less memory than unrolling at every K, and less growth with K."""
    for terms in (1, 2, 3):
        peaks = [data[f"K = {k}, binomial, L = {terms}"]["peak_bytes"] for k in steps]
        whole = [data[f"K = {k}, {REFERENCE}"]["peak_bytes"] for k in steps]
        assert all(ours < theirs for ours, theirs in zip(peaks, whole, strict=True)), terms
        assert peaks[-1] - peaks[0] < whole[-1] - whole[0], terms


def texts(cell: dict[str, Any]) -> list[str]:
    ratio = cell["ratio"]
    return [
        human_bytes(cell["peak_bytes"]),
        f"{1e3 * cell['seconds']:.0f} ms",
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
        f"{cell['error']:.1e}",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of every timing")
    parser.add_argument(
        "--steps", type=lambda text: [int(k) for k in text.split(",")], default=[5, 10, 20]
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
