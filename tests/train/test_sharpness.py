"""SAM and VASSO in a run: two passes over the same samples, batch norms that record one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.errors import ConfigError
from surgery.optim.reflora_s import RefLoRAS
from surgery.train import checkpoints
from surgery.train.engine import engine
from surgery.train.finetune.run import finetune
from surgery.train.run import Pretraining, assembled, pretrain
from surgery.train.statistics import unrecorded
from tests.train import parts, tiny
from tests.train.finetune import tiny as tuned

VASSO = 'train.sharpness={"name": "vasso", "rho": 0.05, "theta": 0.5}'
SAM = 'train.sharpness={"name": "sam", "rho": 0.05}'
RESNET = json.dumps({"source": "preset:resnet-8-cifar", "config": {"in_chans": 1}})


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupted(whole: Path, out: Path) -> None:
    """A finished run as it was after its third step."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    for path in checkpoints.complete(out / "checkpoints"):
        if path.name != "step-000003":
            shutil.rmtree(path)


@pytest.mark.parametrize("sharpness", [SAM, VASSO], ids=["sam", "vasso"])
def test_a_resumed_run_is_the_whole_one_in_every_bit(sharpness: str, tmp_path: Path):
    config = tiny.digits(sharpness, "checkpoint.keep=3")
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(config, out=whole)
    interrupted(whole, out)
    pretrain(config, out=out, resume=True)
    assert tiny.log(out) == tiny.log(whole)
    assert same_weights(out, whole)
    plain = pretrain(tiny.digits(), out=tmp_path / "plain").out
    assert not same_weights(plain, whole)


def test_theta_one_is_sam_and_less_is_not(tmp_path: Path):
    runs = {
        name: pretrain(tiny.digits(f"train.sharpness={json.dumps(section)}"), out=tmp_path / name)
        for name, section in {
            "sam": {"name": "sam"},
            "same": {"name": "vasso", "theta": 1.0},
            "other": {"name": "vasso", "theta": 0.5},
        }.items()
    }
    assert same_weights(runs["sam"].out, runs["same"].out)
    assert not same_weights(runs["sam"].out, runs["other"].out)


def test_accumulation_does_not_change_the_step(tmp_path: Path):
    losses = [
        tiny.losses(
            pretrain(tiny.digits(VASSO, f"train.accumulate={n}"), out=tmp_path / str(n)).out
        )
        for n in (1, 2)
    ]
    # The mean of two halves is the mean of the whole but for float32 rounding.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_step_is_what_two_passes_by_hand_make(tmp_path: Path):
    config = tiny.digits(VASSO, 'optim={"name": "adamw", "lr": 1e-2}', "schedule.warmup=0")
    job = Pretraining(config)
    data = job.data()
    with engine(config) as accelerator:
        loop = assembled(job, accelerator, data, out=tmp_path)
        loop.start(0)
        batch = next(loop._training_batches(0))
        parameters = [p for p in loop.plain.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        loss = loop.aim.loss(loop.plain, batch, step=1)
        g = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum(each.square().sum() for each in g))
        with torch.no_grad():
            for p, each in zip(parameters, g, strict=True):
                p.add_(0.05 * each / (norm + 1e-7))
        uphill = torch.autograd.grad(loop.aim.loss(loop.plain, batch, step=1), parameters)
        with torch.no_grad():
            for p, place in zip(parameters, before, strict=True):
                p.copy_(place)
        seen: list[torch.Tensor] = []
        loop.optimizer.register_step_pre_hook(
            lambda *_: seen.extend(p.grad.clone() for p in parameters)
        )
        loop.advance(1)
    for found, expected in zip(seen, uphill, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_norms_record_each_batch_once(accumulate: int, tmp_path: Path):
    common = (f"model={RESNET}", "data.size=16", "train.steps=3", "train.batch=4")
    config = tiny.digits(*common, VASSO, f"train.accumulate={accumulate}", "optim.lr=1e-12")
    plain = tiny.digits(*common, f"train.accumulate={accumulate}", "optim.lr=1e-12")
    found, expected = (
        load_file(pretrain(each, out=tmp_path / str(i)).out / "model" / "model.safetensors")
        for i, each in enumerate((config, plain))
    )
    counted = [name for name in expected if name.endswith("num_batches_tracked")]
    assert counted
    assert {int(found[name]) for name in counted} == {3 * accumulate}
    # With weights that stand still, what is recorded is what a run without an ascent records.
    for name in expected:
        if "running" in name:
            assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_norms_in_eval_mode_stay_in_it():
    norms = torch.nn.ModuleList([torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2).eval()])
    x = torch.randn(8, 2) + 3
    with unrecorded(norms):
        assert float(norms[0](x).detach().mean()) == pytest.approx(0, abs=1e-6)
        assert float(norms[1](x).detach().mean()) > 2
    assert all(norm.track_running_stats for norm in norms)
    assert all(int(norm.num_batches_tracked) == 0 for norm in norms)


def test_dropout_masks_of_both_passes_are_the_same(tmp_path: Path):
    """Through a model whose forward says what it drew."""
    drawn: list[float] = []

    class Drawing(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            drawn.append(float(torch.rand(())))
            return self.inner(x)

    class Job(Pretraining):
        def model(self, data: object) -> torch.nn.Module:
            return Drawing(super().model(data))  # type: ignore[arg-type]

    config = tiny.digits(VASSO)
    job = Job(config)
    with engine(config) as accelerator:
        loop = assembled(job, accelerator, job.data(), out=tmp_path)
        loop.start(0)
        drawn.clear()
        for step in (1, 2):
            loop._step(step)
    assert len(drawn) == 4
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


def train(out: Path, overrides: tuple[str, ...], resume: bool = False) -> None:
    """One rank of a run."""
    pretrain(tiny.digits(VASSO, *overrides), out=out, resume=resume)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_ranks_climb_the_same_way(parallel: str, tmp_path: Path):
    """Two ranks that accumulate give the curve of one, and go on from a checkpoint in every bit."""
    overrides = (f'train.parallel="{parallel}"', "train.accumulate=2", "checkpoint.keep=3")
    alone, both, again = (tmp_path / name for name in ("alone", "both", "again"))
    pretrain(tiny.digits(VASSO, "train.accumulate=2"), out=alone)
    assert parts.finish(parts.start_ranks(2, train, both, overrides)) == [0, 0]
    # Sums of two ranks are added in another order, which eight steps of Adam grow.
    assert tiny.losses(both) == pytest.approx(tiny.losses(alone), rel=1e-4)
    interrupted(both, again)
    assert parts.finish(parts.start_ranks(2, train, again, overrides, True)) == [0, 0]
    assert tiny.log(again) == tiny.log(both)
    assert same_weights(again, both)


def test_scaled_losses_are_refused():
    with pytest.raises(ConfigError, match="the losses of fp16 are scaled"):
        tiny.digits(SAM, 'train.precision="fp16"')


@pytest.mark.parametrize("method", ["scalora", "lora-pro", "altlora"])
def test_methods_that_need_the_gradient_at_the_weights_are_refused(method: str):
    rules = json.dumps(tuned.lowrank(method))
    message = rf"rule 'adapters' trains with {method}, whose step.*uphill(.|\n)*reflora-s"
    with pytest.raises(ConfigError, match=message):
        tiny.digits(SAM, f"rules={rules}")
    tiny.digits(f"rules={rules}")
    tiny.digits(SAM, f"rules={json.dumps(tuned.lowrank('reflora'))}")


def test_a_rule_that_changes_factors_goes_on_in_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The direction of VASSO follows factors that RefLoRA-S balances, in checkpoints too."""
    acted: list[int] = []
    after = RefLoRAS.after

    def counted(self: RefLoRAS, optimizer: torch.optim.Optimizer) -> None:
        acted.append(self.steps)
        after(self, optimizer)

    monkeypatch.setattr(RefLoRAS, "after", counted)
    rules = tuned.lowrank("reflora-s", options={"warmup": 1})
    config = tuned.classify(tmp_path / "parts", VASSO, "checkpoint.keep=3", rules=rules)
    whole, out = tmp_path / "whole", tmp_path / "run"
    finetune(config, out=whole)
    assert acted == list(range(8))
    interrupted(whole, out)
    finetune(config, out=out, resume=True)
    assert tiny.log(out) == tiny.log(whole)
    assert same_weights(out, whole)
    plain = finetune(tuned.classify(tmp_path / "parts", rules=rules), out=tmp_path / "plain").out
    assert not same_weights(plain, whole)
