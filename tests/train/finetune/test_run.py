"""Fine-tuning runs: what is trained, what is kept, what is left in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.errors import CheckpointError, ConfigError, ModelStateError, SourceError
from surgery.optim.reflora import RefLoRA
from surgery.train import checkpoints, loop
from surgery.train.finetune.heads import with_head
from surgery.train.finetune.run import finetune
from surgery.train.run import Run
from tests.train import tiny as pretraining
from tests.train.finetune import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny BERT and the table in ``parts``."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny.classify(folder / "parts")
    return folder


@pytest.fixture(scope="module")
def lora(place: Path) -> Run:
    """A finished run with LoRA."""
    config = tiny.classify(place / "parts", rules=tiny.lowrank())
    return finetune(config, out=place / "lora")


def stock(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "parts" / "bert" / "model.safetensors")


def test_the_loss_falls_and_the_evaluation_counts_right_answers(place: Path):
    config = tiny.classify(
        place / "parts", "train.steps=60", "optim.lr=3e-2", "evaluate.every=60",
        "checkpoint.every=60", rules=tiny.lowrank(rank=4),
    )  # fmt: skip
    run = finetune(config, out=place / "longer")
    assert run.evaluation["loss"] < 0.9  # guessing costs log 3 = 1.1 nats
    assert run.evaluation["accuracy"] > 0.5


def test_the_base_stays_as_it_was_and_what_was_put_in_moves(lora: Run, place: Path):
    model = surgery.restore(lora.model)
    now = dict(model.bert.named_parameters())
    for name, weight in stock(place).items():
        assert torch.equal(now[name], weight), name
    moved = [name for name in now if name.endswith("lora_B") and now[name].abs().max() > 0]
    assert len(moved) == 4


def test_only_what_trains_is_in_the_optimizer(place: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(loop.Loop, "run", lambda self, done: seen.append(self))
    finetune(tiny.classify(place / "parts", rules=tiny.lowrank()), out=place / "watched")
    named = {id(p): name for name, p in seen[0].plain.named_parameters()}
    held = {named[id(p)] for group in seen[0].optimizer.param_groups for p in group["params"]}
    assert {"classifier.weight", "classifier.bias"} < held
    assert all("lora_" in name for name in held if not name.startswith("classifier"))
    assert len(held) == 2 + 4 * 2


def test_a_checkpoint_leaves_out_what_is_as_it_was_loaded(lora: Run):
    folder = checkpoints.latest(lora.out / "checkpoints")
    assert folder is not None
    kept = load_file(folder / "model.safetensors")
    assert {name for name in kept if "lora_" not in name} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_changed_base_weight_is_in_the_checkpoint(place: Path):
    config = tiny.classify(place / "parts", "train.steps=3", rules=tiny.lowrank("pissa"))
    run = finetune(config, out=place / "pissa")
    folder = checkpoints.latest(run.out / "checkpoints")
    assert folder is not None
    kept = load_file(folder / "model.safetensors")
    bases = [name for name in kept if name.endswith(("query.weight", "value.weight"))]
    assert len(bases) == 4
    assert not any(name.endswith("key.weight") for name in kept)


def test_the_whole_model_is_checkpointed_on_request(place: Path):
    config = tiny.classify(
        place / "parts", 'checkpoint.weights="all"', "train.steps=3", rules=tiny.lowrank()
    )
    run = finetune(config, out=place / "whole")
    folder = checkpoints.latest(run.out / "checkpoints")
    assert folder is not None
    assert "bert.embeddings.word_embeddings.weight" in load_file(folder / "model.safetensors")


def test_without_rules_everything_is_trained(place: Path):
    run = finetune(tiny.classify(place / "parts", "train.steps=3"), out=place / "full")
    model = surgery.restore(run.model)
    now = dict(model.bert.named_parameters())
    for name, weight in stock(place).items():
        # A bias of keys cancels in the softmax, and one token type is all there is.
        if "key.bias" not in name:
            assert not torch.equal(now[name], weight), name


def test_a_new_head_is_named_and_drawn_from_the_seed(lora: Run, place: Path):
    told = [line["reason"] for line in pretraining.log(lora.out, "event")]
    assert "new, drawn from seed 0: classifier.weight, classifier.bias" in told
    heads = [
        load_file(finetune(config, out=place / name).model / "model.safetensors")
        for name, config in {
            "seed-0": tiny.classify(place / "parts", "train.steps=2", "optim.lr=1e-12"),
            "again": tiny.classify(place / "parts", "train.steps=2", "optim.lr=1e-12"),
            "seed-1": tiny.classify(place / "parts", "train.steps=2", "optim.lr=1e-12", "seed=1"),
        }.items()
    ]
    one, again, other = (head["classifier.weight"] for head in heads)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_the_result_knows_its_classes_and_its_tokenizer(lora: Run):
    model = surgery.restore(lora.model)
    assert model.config.id2label == {0: "age", 1: "colour", 2: "shape"}
    assert json.loads((lora.out / "classes.json").read_text()) == ["age", "colour", "shape"]
    assert (lora.out / "tokenizer" / "tokenizer.json").is_file()


def test_an_adapter_alone_is_saved_where_the_stock_weights_are_as_loaded(place: Path):
    config = tiny.changed(
        {
            "version": 1,
            "model": {"source": str(tiny.llama(place / "llama"))},
            "rules": tiny.lowrank(),
            "data": {"kind": "records", "path": str(place / "parts" / "table.jsonl"),
                     "tokenizer": "bytes", "length": 48},
            "objective": {"kind": "language"},
            **tiny.loop(),
        },
        ("train.steps=3",),
    )  # fmt: skip
    run = finetune(config, out=place / "causal")
    again = surgery.restore(run.out / "adapter", surgery.load(str(place / "llama")))
    whole = surgery.restore(run.model)
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(again.eval()(ids).logits, whole.eval()(ids).logits)


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 11).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def with_stock_head(place: Path) -> nn.Module:
    """What somebody without this library puts the adapter beside."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(99)
    return AutoModelForSequenceClassification.from_pretrained(
        place / "parts" / "bert", num_labels=len(tiny.KINDS)
    )


# PEFT asks transformers by a name that it will drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_trained_head_goes_into_the_adapter_that_peft_loads(lora: Run, place: Path):
    from peft import PeftModel

    whole = logits(surgery.restore(lora.model))
    plain = with_stock_head(place)
    assert not torch.allclose(logits(plain), whole, atol=1e-3)
    theirs = PeftModel.from_pretrained(plain, str(lora.out / "adapter"))
    # PEFT adds the branch to the base's output and we do too, in another order.
    torch.testing.assert_close(logits(theirs), whole, rtol=0, atol=1e-6)
    told = [line["reason"] for line in pretraining.log(lora.out, "event")]
    assert (
        "adapter/ is an adapter of PEFT, with 2 stock tensors that were trained or changed, such "
        "as classifier.weight"
    ) in told


def test_the_same_adapter_is_loaded_by_us(lora: Run, place: Path):
    ours = surgery.load_adapter(with_stock_head(place), lora.out / "adapter")
    torch.testing.assert_close(logits(ours), logits(surgery.restore(lora.model)), rtol=0, atol=1e-6)


# PEFT asks transformers by a name that it will drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_start_that_changed_the_weights_is_converted_for_peft(place: Path):
    from peft import PeftModel

    config = tiny.classify(place / "parts", "train.steps=3", rules=tiny.lowrank("pissa"))
    run = finetune(config, out=place / "pissa-for-peft")
    theirs = PeftModel.from_pretrained(with_stock_head(place), str(run.out / "adapter"))
    # W - B0 A0 + B A there, (W - B0 A0) + B A rounded twice here.
    torch.testing.assert_close(
        logits(theirs), logits(surgery.restore(run.model)), rtol=0, atol=1e-5
    )


def test_no_adapter_alone_where_the_weights_took_in_what_was_learned(place: Path):
    config = tiny.classify(place / "parts", "train.steps=4", rules=tiny.lowrank("scalora"))
    run = finetune(config, out=place / "scalora")
    assert not (run.out / "adapter").exists()
    (told,) = [
        line["reason"]
        for line in pretraining.log(run.out, "event")
        if line["reason"].startswith("no adapter/: ")
    ]
    assert "of full rank" in told
    assert told.endswith("model/ has everything")


def test_no_adapter_alone_where_running_statistics_moved(tmp_path: Path):
    """A ResNet's batch norms: beside the stock model the adapter would compute something else."""
    rules = tiny.lowrank()
    rules["rules"][0]["where"] = {"type": "Conv2d"}
    config = tiny.changed(
        {
            "version": 1,
            "model": {
                "source": "timm:resnet10t",
                "pretrained": False,
                "config": {"in_chans": 1, "num_classes": 10},
            },
            "rules": rules,
            "data": {"kind": "digits", "size": 32},
            "objective": {"kind": "classification"},
            **tiny.loop(),
        },
        ("train.steps=2", "evaluate.samples=16"),
    )
    run = finetune(config, out=tmp_path / "run")
    assert not (run.out / "adapter").exists()
    told = [line["reason"] for line in pretraining.log(run.out, "event")]
    assert any("running_mean is no parameter, and moved" in reason for reason in told)


def test_a_result_can_be_fine_tuned_further(lora: Run, place: Path):
    config = tiny.classify(
        place / "parts",
        f'model.source="{lora.model}"',
        "train.steps=2",
        rules=tiny.lowrank(adapter="second"),
    )
    run = finetune(config, out=place / "further")
    assert surgery.adapters.names(surgery.restore(run.model)) == ("default", "second")


def test_more_can_be_trained_beside_adapters(place: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(loop.Loop, "run", lambda self, done: seen.append(self.plain))
    config = tiny.classify(place / "parts", 'model.unfreeze={"role": "norm"}', rules=tiny.lowrank())
    finetune(config, out=place / "norms")
    trained = {name for name, p in seen[0].named_parameters() if p.requires_grad}
    assert any("LayerNorm" in name for name in trained)
    assert not any("dense.weight" in name and "LayerNorm" not in name for name in trained)


def test_b_learns_faster_with_loraplus(place: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(loop.Loop, "run", lambda self, done: seen.append(self))
    config = tiny.classify(
        place / "parts", "optim.loraplus=16", "schedule.warmup=0", rules=tiny.lowrank()
    )
    finetune(config, out=place / "plus")
    named = {id(p): name for name, p in seen[0].plain.named_parameters()}
    rates = {
        named[id(p)].rpartition(".")[2]: group["lr"]
        for group in seen[0].optimizer.param_groups
        for p in group["params"]
    }
    assert rates["lora_B"] == pytest.approx(16 * rates["lora_A"])


def test_a_rule_sees_gradients_that_are_clipped(place: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[float] = []

    def before(self: RefLoRA, optimizer: torch.optim.Optimizer) -> None:
        given = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(float(nn.utils.get_total_norm(given)))

    monkeypatch.setattr(RefLoRA, "before", before)
    config = tiny.classify(
        place / "parts", "train.clip=1e-3", "train.steps=2", rules=tiny.lowrank("reflora")
    )
    finetune(config, out=place / "clipped")
    # clip_grad_norm_ divides by the norm plus 1e-6.
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_accumulation_weighs_parts_by_their_tokens(place: Path):
    """Texts of one to eight words: a mean of means would differ in the second digit."""
    tiny.llama(place / "weighed")
    runs = {}
    for accumulate in (1, 4):
        config = tiny.changed(
            {
                "version": 1,
                "model": {"source": str(place / "weighed")},
                "data": {"kind": "records", "path": str(place / "parts" / "table.jsonl"),
                         "tokenizer": "bytes", "length": 48},
                "objective": {"kind": "language"},
                **tiny.loop(),
            },
            (f"train.accumulate={accumulate}", "train.steps=3"),
        )  # fmt: skip
        run = finetune(config, out=place / f"accumulate-{accumulate}")
        runs[accumulate] = torch.tensor(pretraining.losses(run.out))
    # float32 sums in another order.
    torch.testing.assert_close(runs[1], runs[4], rtol=1e-5, atol=0)


REFUSED = {
    "wrong tokenizer": (
        ['data.tokenizer="bytes"', "data.length=8"],
        ModelStateError,
        "the model embeds 16",
    ),
    "kept head": (['model.head="keep"'], ModelStateError, "returned BaseModelOutput"),
    "no model": (['model.source="package:nowhere/model"'], SourceError, "no Python package"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, place: Path):
    overrides, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        finetune(tiny.classify(place / "parts", *overrides), out=place / "refused")
    assert not (place / "refused" / "log.jsonl").exists()


def test_a_model_without_a_tokenizer_needs_one(place: Path, tmp_path: Path):
    tiny.llama(tmp_path / "llama")
    config = tiny.classify(place / "parts", f'model.source="{tmp_path / "llama"}"')
    with pytest.raises(ConfigError, match="no tokenizer beside the model"):
        finetune(config, out=tmp_path / "run")


def test_a_checkpoint_goes_with_its_pretrained_weights(tmp_path: Path):
    config = tiny.classify(tmp_path / "parts", "train.steps=6", rules=tiny.lowrank())
    run = finetune(config, out=tmp_path / "run")
    weights = tmp_path / "parts" / "bert" / "model.safetensors"
    other = load_file(weights)
    other["embeddings.word_embeddings.weight"] += 1
    from safetensors.torch import save_file

    save_file(other, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="other pretrained weights"):
        finetune(config, out=run.out, resume=True)


def test_a_head_of_timm_is_made_anew():
    from surgery.train.data.base import Facts

    facts = Facts(kind="digits", classes=10)
    made = [
        with_head(surgery.load("timm:resnet10t"), "classification", facts, "auto", seed=3)
        for _ in range(2)
    ]
    assert made[0].new == ("fc.weight", "fc.bias")
    head, again = (each.model.get_submodule("fc") for each in made)
    assert isinstance(head, nn.Linear)
    assert head.out_features == 10
    assert torch.equal(head.weight, again.weight)
    kept = with_head(made[0].model, "classification", facts, "auto", seed=4)
    assert kept.new == ()
