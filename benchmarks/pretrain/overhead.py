"""What ancre costs inside the trainer: steps of the same run with and without it, in turns.

Both sides are whole runs of the trainer, which logs, watches every gradient and keeps its place in
the data. CPU seconds are beside wall seconds, since a busy machine lengthens the latter.
`llama-8` has the shape of the LLaMA in `benchmarks/ancre_step.py` (width 512, 8 layers, 8 x 256
tokens); the others are the shipped small configurations, whose blocks are so small that a sum of
states is no longer little beside them.

To reach: 1.03 times the step without ancre for `llama-8`, as in the benchmark of the step alone.

Run: ``python benchmarks/pretrain/overhead.py [--rounds 11] [--threads 2] [--only llama-8]``
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import Ratio, as_data, both_clocks, report, table
from throughput import PLAIN, ours

from surgery import shipped
from surgery.train.config import PretrainConfig

LIMIT = 1.03


@dataclass(frozen=True)
class Case:
    """Two runs that differ in their rules.

    Attributes:
        config: A shipped configuration; the one with ancre has the same name and ``-ancre``.
        steps: Steps of each side in one turn.
        overrides: Of both.
    """

    config: str
    steps: int
    overrides: tuple[str, ...] = ()


WIDE = "{hidden_size: 512, intermediate_size: 1376, num_hidden_layers: 8, num_attention_heads: 8}"
CASES = {
    "llama-8": Case("llama-tiny", 2, (f"model.config={WIDE}", "train.batch=8")),
    "llama-tiny": Case("llama-tiny", 5, ("train.batch=4",)),
    "dit-tiny": Case("dit-tiny", 10),
    "resnet-56-digits": Case("resnet-56-digits", 10),
    "mlp-64": Case("mlp-64", 20),
}


def configured(name: str, case: Case) -> PretrainConfig:
    overrides = [*PLAIN, *case.overrides]
    file = shipped.pretraining()[name]
    if PretrainConfig.load(file).objective.kind == "classification":
        overrides.remove("objective.sample=null")
    return PretrainConfig.load(file, overrides)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    with ExitStack() as stack:
        cases: dict[str, Callable[[], None]] = {}
        for side, name in (("plain", case.config), ("ancre", f"{case.config}-ancre")):
            loop, _ = stack.enter_context(ours(configured(name, case)))
            cases[side] = turn(loop, case.steps)
        wall, cpu = both_clocks(cases, rounds=rounds, warmup=2)
    return {
        "wall": wall.ratio("ancre", "plain"),
        "cpu": cpu.ratio("ancre", "plain"),
        "step": wall.median("plain") / case.steps,
    }


def turn(loop: Any, steps: int) -> Callable[[], None]:
    number = itertools.count(1)

    def call() -> None:
        for _ in range(steps):
            loop.advance(next(number))

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [options.only] if options.only else list(CASES)
    found = {name: measure(CASES[name], options.rounds) for name in names}
    rows = [
        [name, str(values["wall"]), str(values["cpu"]), f"{1000 * values['step']:.0f} ms"]
        for name, values in found.items()
    ]
    header = ["run", "ancre / plain, wall [95%]", "ancre / plain, CPU", "a plain step"]
    text = table(header, rows) + f"\n\nllama-8 to reach: {LIMIT}. {options.threads} threads."
    data = {
        name: {k: as_data(v) if isinstance(v, Ratio) else v for k, v in values.items()}
        for name, values in found.items()
    }
    report("pretrain-overhead", text, {"cases": data, "threads": options.threads})


if __name__ == "__main__":
    main()
