"""Several ranks over gloo: the same curve as one rank, whole checkpoints, and no hang."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.errors import CheckpointError, SurgeryError
from surgery.train import checkpoints
from surgery.train.assembly import check_shardable
from surgery.train.run import pretrain
from tests.train import parts, tiny

#: The sums of two ranks are added in another order than those of one: a unit in the last place of
#: float32 (6e-8) at first, which eight steps of Adam through a softmax at temperature 0.01 grow.
TOLERANCE = 1e-4

REWIRED = f"rules={json.dumps(tiny.ancre())}"
FSDP2 = 'train.parallel="fsdp2"'


def train(out: Path, overrides: tuple[str, ...], resume: bool = False) -> None:
    """One rank of a run."""
    try:
        pretrain(tiny.digits(*overrides), out=out, resume=resume)
    except SurgeryError as error:
        (out.parent / f"error-{os.environ.get('RANK', '0')}").write_text(f"{error.code}: {error}")
        raise


def trained(ranks: int, out: Path, *overrides: str, resume: bool = False) -> Path:
    """The folder of a run on so many ranks."""
    codes = parts.finish(parts.start_ranks(ranks, train, out, overrides, resume))
    assert codes == [0] * ranks
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def close(one: Path, other: Path) -> None:
    assert tiny.losses(one) == pytest.approx(tiny.losses(other), rel=TOLERANCE)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-3, msg=name)


SAME = {
    "two ranks": (),
    "two ranks, rewired": (REWIRED,),
    "two ranks that accumulate": (REWIRED, "train.accumulate=2"),
    "two ranks that clip": ("train.clip=0.5",),
    "two ranks that recompute": (REWIRED, "train.checkpointing=true"),
    "two ranks that project gradients": (REWIRED, tiny.GALORE),
}


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_give_the_curve_of_one(name: str, tmp_path: Path):
    overrides = SAME[name]
    alone = pretrain(tiny.digits(*overrides), out=tmp_path / "alone").out
    both = trained(2, tmp_path / "both", *overrides)
    close(both, alone)
    ours, theirs = (tiny.log(out, "evaluation") for out in (both, alone))
    assert [line["accuracy"] for line in ours] == [line["accuracy"] for line in theirs]
    state = json.loads((both / "checkpoints/step-000008/state.json").read_text())
    assert state["ranks"] == 2


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(before: int, after: int, tmp_path: Path):
    alone = pretrain(tiny.digits(REWIRED), out=tmp_path / "alone").out
    out = trained(before, tmp_path / "run", REWIRED)
    cut_back(out, 3)
    trained(after, out, REWIRED, resume=True)
    close(out, alone)
    assert [line["step"] for line in tiny.log(out, "step")] == list(range(1, 9))


def cut_back(out: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of a step."""
    shutil.rmtree(out / "model")
    for path in checkpoints.complete(out / "checkpoints"):
        if path.name != f"step-{step:06d}":
            shutil.rmtree(path)


def test_fsdp2_gives_the_curve_of_one_rank_and_goes_on_bit_for_bit(tmp_path: Path):
    keep = "checkpoint.keep=3"
    alone = pretrain(tiny.digits(REWIRED), out=tmp_path / "alone").out
    out = trained(2, tmp_path / "run", REWIRED, FSDP2, keep)
    close(out, alone)
    whole = weights(out)
    saved = out / "checkpoints" / "step-000003"
    assert len(list(saved.glob("shard-*.safetensors"))) == 2
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    cut_back(out, 3)
    trained(2, out, REWIRED, FSDP2, keep, resume=True)
    again = weights(out)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    matrices = [load_file(each / "matrices" / "000008.safetensors") for each in (out, alone)]
    for name, matrix in matrices[0].items():
        torch.testing.assert_close(matrix, matrices[1][name], rtol=0, atol=1e-3)
    assert surgery.shortcuts(surgery.restore(out / "model"))


#: A DiT, whose blocks have one embedder in common, with an average of its weights.
DIT = (
    'model={"source": "preset:dit-tiny", "config": {"num_layers": 2, "num_attention_heads": 2}}',
    'objective={"kind": "diffusion", "ema": 0.5}',
    "optim.lr=1e-4",
)


def test_fsdp2_shards_a_module_that_blocks_have_in_common_by_itself(tmp_path: Path):
    alone = pretrain(tiny.digits(REWIRED, *DIT), out=tmp_path / "alone").out
    out = trained(2, tmp_path / "run", REWIRED, *DIT, FSDP2)
    close(out, alone)
    whole = weights(out)
    cut_back(out, 6)
    trained(2, out, REWIRED, *DIT, FSDP2, resume=True)
    again = weights(out)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    averages = [load_file(each / "model-ema/model.safetensors") for each in (out, alone)]
    for name, average in averages[0].items():
        torch.testing.assert_close(average, averages[1][name], rtol=0, atol=1e-3, msg=name)


def test_shards_do_not_go_on_alone(tmp_path: Path):
    out = trained(2, tmp_path / "run", FSDP2)
    shutil.rmtree(out / "model")
    with pytest.raises(CheckpointError, match="holds a sharded model, and this run has a whole"):
        pretrain(tiny.digits(FSDP2), out=out, resume=True)


def test_blocks_that_share_parameters_are_not_sharded():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
    check_shardable(nn.Sequential(blocks))
    blocks[2][1].weight = blocks[1][1].weight
    with pytest.raises(surgery.ModelStateError, match=r"0\.1 and 0\.2 share 1\.weight"):
        check_shardable(nn.Sequential(blocks))


def test_a_batch_that_cannot_be_split_is_refused_on_every_rank(tmp_path: Path):
    processes = parts.start_ranks(2, train, tmp_path / "run", ("train.batch=9",))
    assert parts.finish(processes) == [1, 1]
    for rank in range(2):
        told = (tmp_path / f"error-{rank}").read_text()
        assert told.startswith("SRG-CONFIG: a batch of 9 cannot be split over 2 ranks")


def sabotaged(out: Path, how: str) -> None:
    """A rank of a run, of which the second one dies or falls silent within step 3."""
    from surgery.train import run

    calls, build = iter(range(1000)), run.build_model

    def stop(*_: Any) -> None:
        if os.environ["RANK"] == "1" and out.exists() and next(calls) == 2:
            (out.parent / "fell").touch()
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "fails":
                raise ValueError("this rank has had enough")
            time.sleep(parts.PATIENCE)

    def built(config: Any) -> tuple[nn.Module, tuple[str, ...]]:
        model, told = build(config)
        model.get_submodule("blocks.1").register_full_backward_hook(stop)
        return model, told

    run.build_model = built
    train(out, ("train.timeout=20", "train.steps=200"))


@pytest.mark.parametrize("how", ["dies", "fails", "falls silent"])
def test_a_rank_that_is_lost_ends_the_run(how: str, tmp_path: Path):
    first, second = parts.start_ranks(2, sabotaged, tmp_path / "run", how)
    parts.until((tmp_path / "fell").exists, second)
    since = time.monotonic()
    try:
        (code,) = parts.finish([first])
        # The limit is 20 seconds; the rest is for a busy machine to notice.
        assert time.monotonic() - since < 90, "it hung"
        assert code not in (0, None)
        assert "another rank died or stopped answering" in (tmp_path / "error-0").read_text()
    finally:
        second.kill()
        second.join()
    assert len(tiny.losses(tmp_path / "run")) < 200


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path):
    processes = parts.start_ranks(2, spoiled, tmp_path / "run")
    assert parts.finish(processes) == [1, 1]
    for rank in range(2):
        told = (tmp_path / f"error-{rank}").read_text()
        assert "step 3" in told
        assert "the output of blocks.1 is the first that is not finite" in told


def spoiled(out: Path) -> None:
    """A rank of a run, of which the second one sees NaN in step 3."""
    from surgery.train import run
    from surgery.train.objectives.classification import Classification

    state, build, loss = {"step": 0}, run.build_model, Classification.loss

    def spoil(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        bad = os.environ["RANK"] == "1" and state["step"] == 3
        return output * float("nan") if bad else output

    def built(config: Any) -> tuple[nn.Module, tuple[str, ...]]:
        model, told = build(config)
        model.get_submodule("blocks.1").register_forward_hook(spoil)
        return model, told

    def counted(self: Any, model: nn.Module, batch: Any, *, step: int) -> torch.Tensor:
        state["step"] = step
        return loss(self, model, batch, step=step)

    run.build_model, Classification.loss = built, counted
    train(out, ())


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--standalone"],
    # With --cpu accelerate starts one process. This starts two; the configuration says: on the CPU.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_both_launchers_start_the_command(launcher: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(tiny.digits("train.steps=4").to_yaml())
    command = [sys.executable, "-m", *LAUNCHERS[launcher]]
    arguments = ["-m", "surgery.cli", "pretrain", "config.yaml", "--out", "run", "--no-plots"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=parts.PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out: loss") == 1, "the main rank speaks alone"
    alone = pretrain(tiny.digits("train.steps=4"), out=tmp_path / "alone").out
    close(tmp_path / "run", alone)
    state = json.loads((tmp_path / "run/checkpoints/step-000004/state.json").read_text())
    assert state["ranks"] == 2
