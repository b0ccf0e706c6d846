"""Steps that are not finite, and spikes: stopped or skipped, with step, batch and layer named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from surgery.errors import TrainingError
from surgery.train.config import PretrainConfig
from surgery.train.run import pretrain
from surgery.train.watch import Blame, Mean
from tests.train import tiny


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One module of the model gives NaN at one step; which, is written into the fixture."""
    from surgery.train import run
    from surgery.train.objectives.classification import Classification

    state: dict[str, Any] = {"step": 0, "at": 5, "path": "blocks.2", "where": "forward"}
    build, loss = run.build_model, Classification.loss

    def built(config: PretrainConfig) -> tuple[nn.Module, tuple[str, ...]]:
        model, told = build(config)
        model.get_submodule(state["path"]).register_forward_hook(spoil)
        return model, told

    def spoil(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if state["step"] != state["at"]:
            return output
        if state["where"] == "forward":
            return output * math.nan
        if state["where"] == "spike":
            return output * 100
        clone = output.clone()
        clone.register_hook(lambda gradient: gradient * math.inf)
        return clone

    def counted(self: Any, model: nn.Module, batch: Any, *, step: int) -> torch.Tensor:
        state["step"] = step
        return loss(self, model, batch, step=step)

    monkeypatch.setattr(run, "build_model", built)
    monkeypatch.setattr(Classification, "loss", counted)
    return state


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_layer(
    tmp_path: Path, armed: dict[str, Any]
):
    told = r"step 5: the loss is nan .*; samples 32\.\.39 of the run; the output of blocks\.2 is"
    with pytest.raises(TrainingError, match=told):
        pretrain(tiny.digits(), out=tmp_path / "run")
    (event,) = tiny.log(tmp_path / "run", "event")
    assert (event["step"], event["event"]) == (5, "stopped")
    assert [line["step"] for line in tiny.log(tmp_path / "run", "step")] == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_is_named_too(tmp_path: Path, armed: dict[str, Any]):
    armed["where"] = "backward"
    told = r"step 5: the loss is \d.* gradient (nan|inf); .* the gradient of the output of blocks"
    with pytest.raises(TrainingError, match=told):
        pretrain(tiny.digits(), out=tmp_path / "run")


def test_a_step_that_is_not_finite_is_skipped_if_so_configured(
    tmp_path: Path, armed: dict[str, Any]
):
    run = pretrain(tiny.digits('train.on_nan="skip"'), out=tmp_path / "run")
    (event,) = tiny.log(run.out, "event")
    assert (event["step"], event["event"]) == (5, "skipped")
    assert "blocks.2" in event["reason"]
    found = tiny.log(run.out, "step")
    assert [line["step"] for line in found if line["loss"] == "nan"] == [5]
    assert all(
        bool(w.isfinite().all()) for w in load_file(run.model / "model.safetensors").values()
    )


def test_skipping_without_end_stops_the_run(tmp_path: Path, armed: dict[str, Any]):
    class Always(int):
        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    armed["at"] = Always()
    with pytest.raises(TrainingError, match="step 20"):
        pretrain(tiny.digits('train.on_nan="skip"', "train.steps=30"), out=tmp_path / "run")


@pytest.mark.parametrize("chosen", ["stop", "skip", "ignore"])
def test_a_spike_is_treated_as_configured(chosen: str, tmp_path: Path, armed: dict[str, Any]):
    armed |= {"at": 25, "where": "spike", "path": "head"}
    config = tiny.digits(f'train.on_spike="{chosen}"', "train.steps=28")
    if chosen == "stop":
        with pytest.raises(TrainingError, match=r"step 25: the loss .* is over 3 times its mean"):
            pretrain(config, out=tmp_path / "run")
        return
    run = pretrain(config, out=tmp_path / "run")
    assert len(tiny.log(run.out, "event")) == (chosen == "skip")


@pytest.mark.parametrize("chosen", ["stop", "skip"])
def test_on_a_device_the_optimizer_leaves_the_step_out_by_itself(
    chosen: str, tmp_path: Path, armed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    from surgery.train import run

    # What is done on CUDA, where the host must not wait for every step; here on the CPU.
    monkeypatch.setattr(run, "by_itself", lambda optimizer, *_, **__: optimizer)
    config = tiny.digits(f'train.on_nan="{chosen}"', "log.every=4", "checkpoint.every=100")
    if chosen == "stop":
        told = r"step 5: .*; samples 32\.\.39 of the run; the output of blocks\.2 is the first"
        with pytest.raises(TrainingError, match=told):
            pretrain(config, out=tmp_path / "run")
        return
    done = pretrain(config, out=tmp_path / "run")
    (event,) = tiny.log(done.out, "event")
    assert (event["step"], event["event"]) == (5, "skipped")
    monkeypatch.undo()
    saved = load_file(done.model / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in saved.values())


def test_a_weight_that_is_not_finite_is_named_itself():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert Blame(model).found is None
    with torch.no_grad():
        model[1].bias[0] = math.inf
    assert Blame(model).found == "the weight 1.bias is not finite itself"


def test_the_mean_of_the_loss_settles_before_it_judges():
    mean = Mean()
    for _ in range(19):
        mean.add(2.0)
    assert mean.value == math.inf
    mean.add(2.0)
    assert mean.value == pytest.approx(2.0)
