"""Runs that are killed and go on: the same log and the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery.errors import CheckpointError
from surgery.train import checkpoints, run
from surgery.train.config import PretrainConfig
from surgery.train.logs import rewind
from surgery.train.run import pretrain
from tests.train import parts, tiny
from tests.train.parts import Process


def config(steps: int) -> Any:
    """A rewired residual MLP."""
    return tiny.digits(
        f"train.steps={steps}",
        f"rules={json.dumps(tiny.ancre())}",
        "checkpoint.every=4",
        "evaluate.every=10",
        "log.matrices=5",
    )


def noisy(model: nn.Module) -> nn.Module:
    """The model with noise from the global generator within, and long enough steps to be hit."""

    def disturb(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        time.sleep(0.01)
        return output + 0.01 * torch.randn_like(output)

    model.get_submodule("embed").register_forward_hook(disturb)
    return model


def train(folder: Path, steps: int, sabotage: str = "") -> None:
    """One part of a run, in a process of its own."""
    build = run.build_model

    def built(config: PretrainConfig) -> tuple[nn.Module, tuple[str, ...]]:
        model, told = build(config)
        return noisy(model), told

    run.build_model = built
    if sabotage:
        _arm(sabotage)
    places = folder / "parts.txt"

    def tell(_kind: str, text: str) -> None:
        if text.startswith("going on from step "):
            with places.open("a") as file:
                file.write(text.rpartition(" ")[2] + "\n")

    pretrain(config(steps), out=folder / "run", resume=True, tell=tell)


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(sabotage: str) -> None:
    """Die at one point of the second checkpoint or of a line of the log."""
    from surgery.checkpoints import swap, tensorfile
    from surgery.train import snapshot
    from surgery.train.logs import RunLog

    if sabotage == "half a checkpoint":
        write = tensorfile.write

        def half(path: Path, tensors: Any, advance: Any) -> str:
            if "step-000008" in path.parent.name and path.name.startswith("optimizer"):
                path.write_bytes(b"half")
                _die()
            return write(path, tensors, advance)

        tensorfile.write = half
    elif sabotage == "before the rename":
        place = swap._put_in_place

        def killed(work: Path, target: Path) -> None:
            if target.name == "step-000008":
                _die()
            place(work, target)

        swap._put_in_place = killed
    elif sabotage == "half a line":
        whole = RunLog.write

        def torn(self: Any, kind: Any, step: int, values: Any) -> None:
            if step == 7:
                self._file.write('{"kind": "step", "st')
                self._file.flush()
                _die()
            whole(self, kind, step, values)

        RunLog.write = torn
    else:
        save = snapshot.Snapshot.save

        def after(self: Any, folder: Path, step: int, *rest: Any) -> None:
            save(self, folder, step, *rest)
            if step == 8:
                _die()

        snapshot.Snapshot.save = after


def started(*arguments: Any) -> Process:
    return parts.start(train, *arguments)


def lines(folder: Path) -> int:
    path = folder / "run" / "log.jsonl"
    return path.read_bytes().count(b'"step", "step"') if path.exists() else 0


def finish(process: Process) -> int:
    (code,) = parts.finish([process])
    return code


def resumed_at(folder: Path) -> list[int]:
    return [int(text) for text in (folder / "parts.txt").read_text().split()]


def same(one: Path, other: Path) -> None:
    """Two run folders hold the same log and the same weights in every bit."""
    assert tiny.log(one / "run") == tiny.log(other / "run")
    ours, theirs = (
        load_file(each / "run" / "model" / "model.safetensors") for each in (one, other)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A run of so many steps that nothing interrupted."""
    made: dict[int, Path] = {}

    def of(steps: int) -> Path:
        if steps not in made:
            made[steps] = tmp_path_factory.mktemp("whole")
            assert finish(started(made[steps], steps)) == 0
        return made[steps]

    return of


def test_killed_five_times_at_random_moments(tmp_path: Path, whole: Callable[[int], Path]):
    draw, steps = random.Random(2602), 40  # noqa: S311 - moments, not secrets
    for kill in range(1, 6):
        process = started(tmp_path, steps)
        # At least one checkpoint further than the last part, at a moment within a step.
        goal = kill * 6 + draw.randint(0, 2)
        parts.until(lambda goal=goal: lines(tmp_path) >= goal, process)
        time.sleep(draw.random() * 0.02)
        assert process.is_alive(), "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL
    assert finish(started(tmp_path, steps)) == 0
    resumed = resumed_at(tmp_path)
    assert len(resumed) == 5, "every part but the first went on from a checkpoint"
    assert all(step > 0 for step in resumed)
    assert [line["step"] for line in tiny.log(tmp_path / "run", "step")] == list(
        range(1, steps + 1)
    )
    same(tmp_path, whole(steps))


SABOTAGE = {
    # where the process dies: the step that the next one goes on from
    "half a checkpoint": 4,
    "before the rename": 4,
    "after a checkpoint": 8,
    "half a line": 4,
}


@pytest.mark.parametrize("moment", SABOTAGE)
def test_killed_at_the_worst_moment(moment: str, tmp_path: Path, whole: Callable[[int], Path]):
    assert finish(started(tmp_path, 12, moment)) == -signal.SIGKILL
    assert finish(started(tmp_path, 12)) == 0
    assert resumed_at(tmp_path) == [SABOTAGE[moment]]
    same(tmp_path, whole(12))
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-000008", "step-000012"}


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path: Path):
    started_anew = pretrain(tiny.digits(), out=tmp_path / "run", resume=True)
    assert [line["step"] for line in tiny.log(started_anew.out, "step")] == list(range(1, 9))


def test_a_finished_run_is_finished(tmp_path: Path):
    first = pretrain(tiny.digits(), out=tmp_path / "run")
    before = tiny.log(first.out)
    again = pretrain(tiny.digits(), out=tmp_path / "run", resume=True)
    assert again.evaluation == first.evaluation
    assert tiny.log(first.out) == before


def stopped(folder: Path, *overrides: str, at: int = 6) -> Path:
    """A run of eight steps as a kill after ``at`` leaves it."""
    import shutil

    done = pretrain(tiny.digits(*overrides), out=folder)
    shutil.rmtree(done.model)
    for path in checkpoints.complete(done.out / "checkpoints"):
        if path.name != f"step-{at:06d}":
            shutil.rmtree(path)
    return done.out


OTHER = {
    "optim.lr=1": r"optim.lr: 0.01 there, 1.0 here",
    "train.steps=9": r"train.steps: 8 there, 9 here",
    "seed=3": r"seed: 0 there, 3 here",
    'model.config={"depth": 8, "width": 16}': r"model.config.depth: 4 there, 8 here",
}


@pytest.mark.parametrize("override", OTHER)
def test_a_checkpoint_of_another_configuration_is_refused(override: str, tmp_path: Path):
    out = stopped(tmp_path / "run")
    with pytest.raises(CheckpointError, match=OTHER[override]):
        pretrain(tiny.digits(override), out=out, resume=True)


def test_a_checkpoint_of_other_rules_is_refused(tmp_path: Path):
    out = stopped(tmp_path / "run")
    rules = json.dumps(tiny.ancre())
    with pytest.raises(CheckpointError, match=r"rules: null there, \{.*here"):
        pretrain(tiny.digits(f"rules={rules}"), out=out, resume=True)


FREE: Sequence[tuple[str, ...]] = (
    ("log.every=2",),
    ("train.accumulate=2",),
    ("train.workers=1",),
    ("train.timeout=100", 'name="other"'),
)


@pytest.mark.parametrize("overrides", FREE, ids=" ".join)
def test_what_does_not_move_the_weights_may_change(overrides: tuple[str, ...], tmp_path: Path):
    out = stopped(tmp_path / "run")
    pretrain(tiny.digits(*overrides), out=out, resume=True)
    assert tiny.log(out, "step")[-1]["step"] == 8


def test_a_broken_checkpoint_is_passed_over(tmp_path: Path):
    done = pretrain(tiny.digits("checkpoint.keep=3"), out=tmp_path / "run")
    folder = done.out / "checkpoints"
    weights = folder / "step-000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "step-000006" / "state.json").unlink()
    (folder / "step-000003" / "rank-00000.json").rename(folder / "step-000003" / "rank-00000.json~")
    assert checkpoints.latest(folder) is None
    (folder / "step-000003" / "rank-00000.json~").rename(folder / "step-000003" / "rank-00000.json")
    assert checkpoints.latest(folder) == folder / "step-000003"


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(CheckpointError, match="has format 99, and this version reads 1"):
        checkpoints.read_progress(folder)


def test_the_log_is_cut_back(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text(
        '{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}\n{"kind": "st'
    )
    (tmp_path / "matrices").mkdir()
    for step in (1, 2):
        (tmp_path / "matrices" / f"{step:06d}.safetensors").touch()
    rewind(tmp_path, 1)
    assert tiny.log(tmp_path) == [{"kind": "step", "step": 1}]
    assert [path.name for path in (tmp_path / "matrices").iterdir()] == ["000001.safetensors"]


@pytest.mark.parametrize("last", [3, 6])
def test_galore_goes_on_bit_for_bit_between_and_at_new_projections(last: int, tmp_path: Path):
    config = tiny.language(tiny.corpus(tmp_path), tiny.GALORE, "checkpoint.keep=3")
    whole, out = tmp_path / "whole", tmp_path / "run"
    losses = tiny.losses(pretrain(config, out=whole).out)
    plain = tiny.language(tmp_path / "corpus.txt", "optim.lr=1e-2", "optim.weight_decay=0.0")
    assert losses[1:] != tiny.losses(pretrain(plain, out=tmp_path / "plain").out)[1:]
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    for path in checkpoints.complete(out / "checkpoints"):
        if path.name != f"step-{last:06d}":
            shutil.rmtree(path)
    pretrain(config, out=out, resume=True)
    assert tiny.log(out) == tiny.log(whole)
    found, expected = (load_file(each / "model" / "model.safetensors") for each in (out, whole))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
