"""``pretrain`` from end to end on small models: what a run leaves behind, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.checkpoints import tensorfile
from surgery.errors import CheckpointError, ConfigError, TrainingError
from surgery.train import checkpoints, loop
from surgery.train.config import PretrainConfig
from surgery.train.data.base import Batch
from surgery.train.objectives.language import Language
from surgery.train.run import Run, pretrain
from tests.train import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of a rewired language model."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny.language(tiny.corpus(folder), "log.tensorboard=true", "evaluate.every=5")
    return pretrain(config, out=folder / "run")


def test_the_log_has_every_step_once(finished: Run):
    assert [line["step"] for line in tiny.log(finished.out, "step")] == list(range(1, 9))
    for line in tiny.log(finished.out, "step"):
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert line["tokens"] == line["step"] * 8 * 32


def test_methods_of_adapters_act_in_pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def trained(method: str, **options: Any) -> Path:
        section = {"method": method, "rank": 2, "freeze": "none", "options": options}
        rule = {"pass": "lowrank", "where": {"type": "Linear"}, "with": section}
        rules = json.dumps({"version": 1, "recipe": method, "rules": [rule]})
        return pretrain(tiny.digits(f"rules={rules}"), out=tmp_path / method).out

    plain, balanced = tiny.losses(trained("lora")), tiny.losses(trained("reflora", warmup=2))
    # The step whose factors are rebalanced is the third: the fourth loss shows it.
    assert balanced[:3] == plain[:3]
    assert balanced[3] != plain[3]
    seen: list[Any] = []
    monkeypatch.setattr(loop.Loop, "run", lambda self, _: seen.append(self))
    trained("sorsa")
    penalty = seen[0].penalty(seen[0].plain)
    assert penalty.requires_grad
    assert penalty.item() >= 0


def test_what_the_plan_warns_of_is_in_the_log(tmp_path: Path):
    rule = {"pass": "mirror", "where": {"type": "Linear"}, "with": {"map": "block_iaf"}}
    rules = json.dumps({"version": 1, "recipe": "heavy", "rules": [rule]})
    out = pretrain(tiny.digits(f"rules={rules}", "train.steps=2"), out=tmp_path / "run").out
    told = [line["reason"] for line in tiny.log(out, "event")]
    assert any("times the 2.3 k that they map" in reason for reason in told), told


def test_a_batch_in_one_part_is_not_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def weigh(_: Language, __: Batch) -> torch.Tensor:
        raise AssertionError("weighed")

    # As if samples had different lengths.
    monkeypatch.setattr(Language, "weighed", property(lambda _: True, lambda _, __: None))
    monkeypatch.setattr(Language, "weight", weigh)
    corpus = tiny.corpus(tmp_path)
    pretrain(tiny.language(corpus, "train.steps=2"), out=tmp_path / "whole")
    with pytest.raises(AssertionError, match="weighed"):
        pretrain(tiny.language(corpus, "train.accumulate=2"), out=tmp_path / "parts")


def test_the_loss_falls(finished: Run):
    found = tiny.losses(finished.out)
    assert found[0] == pytest.approx(math.log(264), rel=0.05), "random weights know nothing"
    assert found[-1] < found[0] - 0.3


def test_the_learning_rate_follows_its_schedule(finished: Run):
    rates = [line["lr"] for line in tiny.log(finished.out, "step")]
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(3e-4)


def test_evaluation_is_logged_and_returned(finished: Run):
    lines = tiny.log(finished.out, "evaluation")
    assert [line["step"] for line in lines] == [5, 8]
    assert finished.evaluation["perplexity"] == pytest.approx(math.exp(lines[-1]["loss"]))


def test_matrices_are_recorded_and_learned(finished: Run):
    lines = tiny.log(finished.out, "matrices")
    assert [line["step"] for line in lines] == [0, 4, 8]
    (name, first), *others = load_file(finished.out / lines[0]["file"]).items()
    last = load_file(finished.out / lines[-1]["file"])[name]
    assert not others
    assert first.shape == (4, 4)
    assert not torch.equal(first, last), "the coefficients are trained"


def test_the_result_is_restored_with_its_rules(finished: Run):
    model = surgery.restore(finished.model)
    assert type(model).__name__ == "LlamaForCausalLM"
    (matrix,) = surgery.shortcuts(model).values()
    saved = load_file(finished.out / "matrices" / "000008.safetensors")
    assert torch.equal(matrix, next(iter(saved.values())))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_tensorboard_has_scalars_and_the_matrix_as_an_image(finished: Run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.out / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("step/loss")) == 8
    (image,) = [name for name in events.Tags()["images"] if name.startswith("matrices/")]
    assert [event.step for event in events.Images(image)] == [0, 4, 8]


def test_the_last_checkpoints_are_kept(finished: Run):
    names = [path.name for path in checkpoints.complete(finished.out / "checkpoints")]
    assert names == ["step-000006", "step-000008"]
    assert {path.suffix for path in (finished.out / "checkpoints").rglob("*.*")} == {
        ".json",
        ".safetensors",
    }


def test_the_configuration_is_written_whole(finished: Run):
    config = PretrainConfig.load(finished.out / "config.yaml")
    assert config.recipe is not None
    assert config.train.steps == 8


def test_shortcut_logits_do_not_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(loop.Loop, "run", lambda self, done: seen.append(self))
    pretrain(tiny.language(tiny.corpus(tmp_path)), out=tmp_path / "run")
    named = {id(parameter): name for name, parameter in seen[0].plain.named_parameters()}
    decay = {
        named[id(parameter)]: group["weight_decay"]
        for group in seen[0].optimizer.param_groups
        for parameter in group["params"]
    }
    free = [name for name, value in decay.items() if value == 0]
    assert free
    assert all("shortcuts" in name for name in free)
    assert set(decay.values()) == {0, 0.1}


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tmp_path: Path):
    runs = {
        name: pretrain(tiny.digits(f"seed={seed}"), out=tmp_path / name)
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    }
    assert tiny.log(runs["one"].out) == tiny.log(runs["again"].out)
    assert tiny.losses(runs["one"].out) != tiny.losses(runs["other"].out)


ALIKE: dict[str, tuple[str, ...]] = {
    # The same batch in parts: gradients are sums in another order.
    "accumulation": ("train.accumulate=4",),
    "recomputation": ("train.checkpointing=true",),
    "workers": ("train.workers=1",),
}


@pytest.mark.parametrize("name", ALIKE)
def test_how_a_step_is_computed_does_not_change_it(name: str, tmp_path: Path):
    plain = pretrain(tiny.digits("train.steps=4"), out=tmp_path / "plain")
    other = pretrain(tiny.digits("train.steps=4", *ALIKE[name]), out=tmp_path / "other")
    # float32 sums in another order: a few units in the last place, grown by Adam over 4 steps.
    assert tiny.losses(other.out) == pytest.approx(tiny.losses(plain.out), rel=1e-4)


def test_a_library_model_recomputes_in_its_own_way(tmp_path: Path):
    corpus = tiny.corpus(tmp_path)
    plain = pretrain(tiny.language(corpus, "train.steps=3"), out=tmp_path / "plain")
    other = tiny.language(corpus, "train.steps=3", "train.checkpointing=true")
    again = pretrain(other, out=tmp_path / "other")
    assert tiny.losses(again.out) == pytest.approx(tiny.losses(plain.out), rel=1e-5)


def test_autocast_is_close_to_float32_and_leaves_no_trace(tmp_path: Path):
    plain = pretrain(tiny.digits("train.steps=4"), out=tmp_path / "plain")
    config = tiny.digits("train.steps=4", 'train.precision="bf16"')
    half = pretrain(config, out=tmp_path / "half")
    ours, theirs = tiny.losses(half.out), tiny.losses(plain.out)
    # bfloat16 has eight bits: about 0.4 % each time a value is rounded.
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours != theirs, "autocast was on"
    model = surgery.restore(half.model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_in_bfloat16_are_trained_as_they_are(tmp_path: Path):
    config = tiny.language(tiny.corpus(tmp_path), "train.steps=3", 'model.dtype="bfloat16"')
    run = pretrain(config, out=tmp_path / "run")
    weights = load_file(run.model / "model.safetensors")
    assert weights["lm_head.weight"].dtype is torch.bfloat16


def test_clipping_bounds_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    norms: list[float] = []
    judge = loop.Loop._judge

    def look(self: loop.Loop, *args: Any) -> bool:
        gradients = [p.grad for p in self.plain.parameters()]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return judge(self, *args)

    monkeypatch.setattr(loop.Loop, "_judge", look)
    run = pretrain(tiny.digits("train.steps=3", "train.clip=0.1"), out=tmp_path / "run")
    assert norms == pytest.approx([0.1] * 3, rel=1e-3)
    assert all(line["grad_norm"] > 0.1 for line in tiny.log(run.out, "step"))


def test_a_folder_with_a_run_is_not_written_over(finished: Run):
    with pytest.raises(TrainingError, match="holds a run already"):
        pretrain(tiny.digits(), out=finished.out)


def test_what_does_not_go_with_the_device_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="fp16 needs an accelerator"):
        pretrain(tiny.digits('train.precision="fp16"'), out=tmp_path / "run")


def test_a_launcher_that_wants_fsdp_is_contradicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"the launcher asks for FSDP.*is ddp"):
        pretrain(tiny.digits(), out=tmp_path / "run")


def test_a_model_without_blocks_cannot_recompute(tmp_path: Path):
    config = tiny.digits("train.checkpointing=true", 'model.config={"depth": 1, "width": 16}')
    with pytest.raises(surgery.ModelStateError, match="no stack of blocks"):
        pretrain(config, out=tmp_path / "run")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    write, calls = tensorfile.write, iter(range(1000))

    def full(path: Path, tensors: Any, advance: Any) -> str:
        if "step-000006" in str(path.parent) and next(calls) == 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, tensors, advance)

    monkeypatch.setattr(tensorfile, "write", full)
    told = r"no room for the checkpoint of step 6 .* needs .* are free; step-000003 is whole"
    with pytest.raises(CheckpointError, match=told):
        pretrain(tiny.digits(), out=out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]
    monkeypatch.undo()
    pretrain(tiny.digits(), out=out, resume=True)
    assert tiny.log(out) == tiny.log(pretrain(tiny.digits(), out=tmp_path / "whole").out)


def test_too_little_room_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import shutil

    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(CheckpointError, match=r"it needs .* KiB, and 4.88 KiB are free; there is"):
        pretrain(tiny.digits(), out=tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
