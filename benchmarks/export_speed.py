"""``surgery.export`` against ``safetensors.save_file``: a rewired LLaMA in remote code.

What is compared is everything the format ``transformers`` writes (weights, modelling file,
configuration) with ``save_file`` of the same state dict; both are flushed to the disk, and once
more neither is, by the wall and by the CPU. One whole export is timed by its parts: writing,
hashing, and the check by the real consumer, which is a process of its own with a model of its own.
Memory is the highest resident size while writing over that before, from the kernel.

To reach: at most 1.1 times the time, and at most the largest shard more than the model itself.

Run: ``python benchmarks/export_speed.py [--gb 2] [--rounds 5] [--place /tmp] [--whole]``
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from harness import Timings, as_data, both_clocks, report, table
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery import progress
from surgery.checkpoints.inventory import take
from surgery.checkpoints.saving import size_of
from surgery.exporting.weights import SHARD
from surgery.registry import FORMATS
from surgery.sources import Example

TIME = 1.1
LENGTH = 16
VOCABULARY = 32_000


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="The speed and memory of exports.")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--whole", action="store_true", help="time one whole export, too")
    args = parser.parse_args()
    model = rewired(args.gb)
    state = take(model).state
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with tempfile.TemporaryDirectory(dir=args.place) as scratch:
        place = Path(scratch)
        flushed, _ = compare(model, state, place, args.rounds)
        with mock.patch.object(os, "fsync"):
            cached, cpu = compare(model, state, place, args.rounds)
        growth = grown(partial(export, model, fresh(place)))
        parts = whole(model, place) if args.whole else {}
    timings = {"flushed to the disk": flushed, "not flushed": cached, "not flushed, CPU": cpu}
    tell(size, growth, timings, parts)


def rewired(gb: float) -> nn.Module:
    """A LLaMA of about this size in bfloat16, with learned shortcuts."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    width = 2048 if gb >= 1 else 512
    layer = 2 * (2.25 * width**2 + 3 * width * (11 * width // 4))  # bytes, in bfloat16
    layers = max(2, round((gb * 1e9 - 4 * VOCABULARY * width) / layer))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 512,
    )
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Drawing a billion numbers takes longer than what is measured: a few, again and again.
    drawn = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1).copy_(
                drawn.repeat(-(-parameter.numel() // len(drawn)))[: parameter.numel()]
            )
    rule = surgery.Rule(surgery.Shortcuts(), where=surgery.Stack("all"))
    return surgery.apply(model.eval(), rule, example=call())


def call() -> dict[str, Any]:
    """A call of the model."""
    return {"input_ids": torch.arange(LENGTH).reshape(1, LENGTH), "use_cache": False}


def compare(
    model: nn.Module, state: dict[str, Any], place: Path, rounds: int
) -> tuple[Timings, Timings]:
    """Time both, in turns, by the wall and by the CPU."""
    tensors = {name: tensor.detach() for name, tensor in state.items()}

    def saved() -> None:
        file = fresh(place) / "model.safetensors"
        save_file(tensors, file)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())

    cases = {"export": lambda: export(model, fresh(place)), "save_file": saved}
    return both_clocks(cases, rounds=rounds, warmup=1, prepare=partial(fresh, place))


def export(model: nn.Module, folder: Path) -> None:
    """Everything that the format writes."""
    FORMATS.get("transformers")().write(model, folder, Example((), call()))


def fresh(place: Path) -> Path:
    """An empty folder."""
    folder = place / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def grown(run: Callable[[], object]) -> int:
    """Bytes by which the resident size rose above what it was, at most, while ``run`` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """A size of this process in bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{what}:")))


class Stages:
    """Notes how long each task took that the library reports."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun: dict[int, float] = {}

    def started(self, task: progress.Task) -> None:
        """It begins."""
        self._begun[id(task)] = time.perf_counter()

    def advanced(self, task: progress.Task) -> None:
        """It goes on."""

    def finished(self, task: progress.Task) -> None:
        """It ends."""
        taken = time.perf_counter() - self._begun.pop(id(task))
        self.seconds[task.title] = self.seconds.get(task.title, 0.0) + taken


@contextmanager
def staged() -> Generator[dict[str, float]]:
    """Seconds of every task that is reported meanwhile."""
    stages = Stages()
    with progress.listen(cast("progress.Listener", stages)):
        yield stages.seconds


def whole(model: nn.Module, place: Path) -> dict[str, float]:
    """Seconds of the parts of one whole export."""
    start = time.perf_counter()
    with staged() as seconds:
        surgery.export(model, place / "whole", format="transformers", example=call())
    return {**seconds, "whole export": time.perf_counter() - start}


def tell(size: int, growth: int, timings: dict[str, Timings], parts: dict[str, float]) -> None:
    """Print and write down what was measured."""
    rows: list[list[str]] = []
    data: dict[str, Any] = {"bytes": size, "growth": growth, "parts": parts}
    for name, found in timings.items():
        ratio = found.ratio("export", "save_file")
        seconds = [found.median(case) for case in ("export", "save_file")]
        rows.append([name, *(f"{each:.2f} s" for each in seconds), str(ratio)])
        data[name] = {"seconds": dict(found.seconds), "ratio": as_data(ratio)}
    text = table(["", "export", "save_file", "ratio [95%]"], rows)
    shard = min(size, size_of(SHARD))
    text += (
        f"\n\n{size / 1e9:.2f} GB of weights; while writing the resident size grew by "
        f"{growth / 1e6:.1f} MB (bound: the largest shard, {shard / 1e6:.0f} MB); "
        f"bound of the ratio {TIME}.\n"
    )
    if parts:
        listed = [[name, f"{seconds:.1f} s"] for name, seconds in parts.items()]
        text += "\n" + table(["part of one whole export", "time"], listed) + "\n"
    report("export_speed", text, data)


if __name__ == "__main__":
    main()
