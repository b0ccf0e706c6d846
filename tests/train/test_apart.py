"""Runs in processes of their own. Each starts Python and imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import TrainingError
from surgery.train import apart
from surgery.train.config import PretrainConfig


def config(**changes: Any) -> PretrainConfig:
    size = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
    }
    data: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": "preset:llama-tiny", "config": size},
        "data": {"kind": "text", "path": str(Path(__file__)), "length": 16, "held_out": 0.2},
        "objective": {"kind": "language"},
        "optim": {"name": "adamw", "lr": 1e-3},
        "train": {"steps": 2, "batch": 2},
        "evaluate": {"samples": 2},
        "log": {"every": 1, "tensorboard": False},
    }
    return PretrainConfig.parse({**data, **changes})


def test_a_run_leaves_its_folder_and_its_peak_of_memory(tmp_path: Path) -> None:
    peak = apart.in_a_process(config(), tmp_path / "run")

    # More than the weights of a model of some thousand parameters, less than the libraries.
    assert peak is not None
    assert 2**14 < peak < 2**31
    assert (tmp_path / "run" / "model").is_dir()
    assert (tmp_path / "run" / "log.jsonl").is_file()


def test_the_error_of_a_run_is_raised_here(tmp_path: Path) -> None:
    nowhere = {"kind": "text", "path": str(tmp_path / "nowhere"), "length": 16}

    with pytest.raises(TrainingError, match="nowhere") as caught:
        apart.in_a_process(config(data=nowhere), tmp_path / "run")

    assert str(caught.value).startswith("tiny, seed 0: ")
    assert caught.value.hint


def test_under_a_launcher_runs_share_the_processes_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Path, bool]] = []

    def pretrain(config: PretrainConfig, *, out: Path, resume: bool) -> None:
        calls.append((config.name, out, resume))

    monkeypatch.setattr("surgery.train.run.pretrain", pretrain)
    on_cpu = config(train={"steps": 2, "batch": 2, "device": "cpu"})

    # The peak of a process that has had other runs is not this run's.
    assert apart.here(on_cpu, tmp_path) is None
    assert calls == [("tiny", tmp_path, True)]


def test_a_process_that_says_nothing_is_told_by_its_exit_code() -> None:
    with pytest.raises(TrainingError, match="exit code -9 and said nothing"):
        apart._peak_of("", -9, config())


def test_without_a_parent_the_process_ends(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from surgery.train import apart\n"
        "print('ready', flush=True); apart._end_with_parent(); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        assert process.wait(60) == 3
