"""Fine-tuning that is killed in the middle of a step and goes on: the same log, the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from surgery.train.finetune import run
from surgery.train.finetune.run import finetune
from tests.train import parts
from tests.train.finetune import tiny
from tests.train.tiny import log

STEPS = 30
METHODS: dict[str, dict[str, Any]] = {
    "reflora": {"options": {"warmup": 4}},
    # Folds into the base weight at every step, which a resume would else load from the source.
    "scalora": {},
}


def config(folder: Path, method: str) -> Any:
    """The tiny BERT with a method that does something around the optimizer's step."""
    return tiny.classify(
        folder,
        f"train.steps={STEPS}",
        "train.accumulate=2",
        "train.clip=1.0",
        "checkpoint.every=4",
        "evaluate.every=100",
        rules=tiny.lowrank(method, dropout=0.1, **METHODS[method]),
    )


def train(folder: Path, method: str, slow: bool) -> None:
    """One part of a run, in a process of its own; each forward takes long enough to be hit."""
    build = run.build

    def slowed(*arguments: Any) -> Any:
        built = build(*arguments)

        def wait(_module: nn.Module, _args: object) -> None:
            time.sleep(0.02)

        built.model.register_forward_pre_hook(wait)
        return built

    if slow:
        run.build = slowed
    places = folder.parent / f"{folder.name}.txt"

    def tell(_kind: str, text: str) -> None:
        if text.startswith("going on from step "):
            with places.open("a") as file:
                file.write(text.rpartition(" ")[2] + "\n")

    finetune(config(folder.parent / "parts", method), out=folder, resume=True, tell=tell)


def logged(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_bytes().count(b'"step", "step"') if path.exists() else 0


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(method: str, tmp_path: Path):
    config(tmp_path / "parts", method)
    assert parts.finish([parts.start(train, tmp_path / "whole", method, False)]) == [0]
    killed = tmp_path / "killed"
    draw = random.Random(method)  # noqa: S311 - moments to kill at
    for until in (6, 13):
        process = parts.start(train, killed, method, True)
        parts.until(lambda until=until: logged(killed) >= until, process)
        time.sleep(draw.uniform(0, 0.04))
        os.kill(process.pid, signal.SIGKILL)
        assert parts.finish([process]) == [-signal.SIGKILL]
    assert parts.finish([parts.start(train, killed, method, False)]) == [0]
    resumed = [int(line) for line in (tmp_path / "killed.txt").read_text().split()]
    assert len(resumed) == 2
    assert all(step > 0 for step in resumed)
    assert resumed[1] > resumed[0]
    assert [line["step"] for line in log(killed, "step")] == list(range(1, STEPS + 1))
    assert log(killed) == log(tmp_path / "whole")
    one, other = (
        load_file(out / "model" / "model.safetensors") for out in (killed, tmp_path / "whole")
    )
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert json.loads((killed / "classes.json").read_text()) == sorted(tiny.KINDS)
