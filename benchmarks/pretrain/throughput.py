"""The trainer against a bare PyTorch loop: the same model, data, optimizer and precision.

The bare loop is what one writes in twenty lines: a DataLoader over the same samples, forward,
backward, AdamW (fused) and schedule, and the loss read every ten steps. Ours does the same and
looks at every gradient, logs, and keeps its place in the data. Both make ten steps, in turns, so
that a busy machine slows both alike; CPU seconds are beside wall seconds for the same reason.

The share of data loading is the time that the loop waits for its next batch.

To reach: 0.97 times the bare loop's throughput, and less than 2% of a step spent on data.

Run: ``python benchmarks/pretrain/throughput.py [--rounds 15] [--threads 1] [--only llama-tiny]``
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import Ratio, as_data, both_clocks, interleave, report, table
from study import started

from surgery.train import run as runs
from surgery.train.config import PretrainConfig
from surgery.train.data import open_data
from surgery.train.loop import Loop
from surgery.train.optimizers import Curve

STEPS = 10
"""Steps of each side in one turn; the loss is read once in them."""

THROUGHPUT, DATA = 0.97, 0.02

CASES: dict[str, tuple[str, ...]] = {
    # shipped configuration: overrides
    "llama-tiny": ("train.batch=4",),
    "llama-tiny-ancre": ("train.batch=4",),
    "resnet-tiny": (),
    "mlp-64": (),
}
#: Nothing that a bare loop does not do, but the log.
PLAIN = (
    "train.steps=1000000",
    "train.clip=null",
    "evaluate.every=1000000",
    "checkpoint.every=1000000",
    "log.matrices=null",
    "log.tensorboard=false",
    f"log.every={STEPS}",
    "objective.sample=null",
)


def configured(name: str) -> PretrainConfig:
    overrides = [*PLAIN, *CASES[name]]
    config = PretrainConfig.load(name)
    if config.objective.kind == "classification":
        overrides.remove("objective.sample=null")
    return PretrainConfig.load(name, overrides)


def forward_of(config: PretrainConfig) -> Callable[[nn.Module, dict[str, torch.Tensor]], Any]:
    if config.objective.kind == "language":
        return lambda model, batch: (
            model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
        )
    return lambda model, batch: F.cross_entropy(model(batch["images"]), batch["labels"])


class Plain(Dataset[Any]):
    """Samples by number, as a Dataset of one's own would have them."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Bare:
    """Twenty lines of PyTorch."""

    def __init__(self, config: PretrainConfig) -> None:
        self.model, _ = runs.build_model(config)
        self.loss = forward_of(config)
        self.optimizer = AdamW(self.model.parameters(), lr=config.optim.lr, fused=True)
        schedule = config.schedule
        curve = Curve(schedule.kind, config.train.steps, schedule.warmup, schedule.final)
        self.schedule = LambdaLR(self.optimizer, curve)
        samples = Plain(open_data(config.data, seed=config.seed).train)
        loader = DataLoader(samples, config.train.batch, shuffle=True, drop_last=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def steps(self) -> float:
        """Ten steps; the loss of the last."""
        for _ in range(STEPS):
            loss = self.loss(self.model, next(self.batches))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        return loss.item()


class Waiting:
    """Counts the seconds in which batches are waited for."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - start
        return batch


@contextlib.contextmanager
def ours(config: PretrainConfig) -> Iterator[tuple[Loop, Waiting]]:
    with started(runs.Pretraining(config)) as loop:
        loop._batches = waiting = Waiting(loop._batches)
        yield loop, waiting


def measure(name: str, rounds: int) -> dict[str, Any]:
    config = configured(name)
    with ours(config) as (loop, waiting):
        step = itertools.count(1)
        bare = Bare(config)

        def advance() -> None:
            for _ in range(STEPS):
                loop.advance(next(step))

        cases: dict[str, Callable[[], object]] = {"ours": advance, "bare": bare.steps}
        interleave(cases, rounds=1, warmup=1)
        waiting.seconds = 0.0
        wall, cpu = both_clocks(cases, rounds=rounds, warmup=0)
    return {
        "wall": wall.ratio("bare", "ours"),
        "cpu": cpu.ratio("bare", "ours"),
        "data": waiting.seconds / sum(wall.seconds["ours"]),
        "step": wall.median("ours") / STEPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [options.only] if options.only else list(CASES)
    found = {name: measure(name, options.rounds) for name in names}
    rows = [
        [
            name,
            str(values["wall"]),
            str(values["cpu"]),
            f"{values['data']:.2%}",
            f"{1000 * values['step']:.0f} ms",
        ]
        for name, values in found.items()
    ]
    header = ["configuration", "ours / bare, wall [95%]", "ours / bare, CPU", "data", "a step"]
    text = table(header, rows)
    text += f"\n\nThroughput of the trainer over that of a bare loop, at least {THROUGHPUT} to "
    text += f"reach; waiting for data less than {DATA:.0%} of a step."
    data = {
        name: {k: as_data(v) if isinstance(v, Ratio) else v for k, v in values.items()}
        for name, values in found.items()
    }
    report("pretrain-throughput", text, {"cases": data})


if __name__ == "__main__":
    main()
