"""The Trainer of transformers with rewritten models: checkpoints, resuming, step rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import surgery
from surgery.errors import CheckpointError, ModelStateError
from surgery.train.callback import SurgeryCallback, plain
from tests.train.finetune import tiny

STEPS = 6


class Numbers(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences of random ids with a random class."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(5, 16, (6,), generator=draw)
        return {"input_ids": ids, "labels": torch.randint(2, (), generator=draw)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("source") / "bert")


def rewritten(source: Path, method: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(source, num_labels=2)
    surgery.apply(model, surgery.Recipe.parse(tiny.lowrank(method, **options)))
    return model


def trainer(model: nn.Module, out: Path, *, callbacks: Any = None, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **given),
        train_dataset=Numbers(),
        eval_dataset=Numbers(),
        callbacks=[SurgeryCallback()] if callbacks is None else callbacks,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


METHODS: dict[str, dict[str, Any]] = {
    "reflora": {"options": {"warmup": 1}},
    # Keeps numbers in float64, which torch would round, and changes base weights.
    "scalora": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_one_that_was_not_interrupted(
    method: str, source: Path, tmp_path: Path
):
    whole = rewritten(source, method, **METHODS[method])
    trainer(whole, tmp_path / "whole").train()
    again = rewritten(source, method, **METHODS[method])
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    callback = SurgeryCallback(resume_from=checkpoint)
    trainer(again, tmp_path / "again", callbacks=[callback]).train(
        resume_from_checkpoint=str(checkpoint)
    )
    same(whole, again)


def test_a_step_rule_acts_in_the_trainer(source: Path, tmp_path: Path):
    models = {}
    for method in ("lora", "reflora"):
        models[method] = rewritten(source, method, **METHODS.get(method, {}))
        trainer(models[method], tmp_path / method).train()
    one, other = (weights(model) for model in models.values())
    assert any(not torch.allclose(one[name], other[name]) for name in one if "lora_A" in name)


def test_checkpoints_hold_the_rewrites(source: Path, tmp_path: Path):
    model = rewritten(source, "lora")
    used = trainer(model, tmp_path)
    used.train()
    same(surgery.restore(tmp_path / f"checkpoint-{STEPS}"), model)
    used.save_model(str(tmp_path / "final"))
    used.save_model(str(tmp_path / "final"))  # over what is there
    same(surgery.restore(tmp_path / "final"), model)
    assert not (tmp_path / "final" / "config.json").exists()


def test_the_best_model_comes_back_with_its_rewrites(source: Path, tmp_path: Path):
    model = rewritten(source, "lora")
    used = trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    used.train()
    assert used.state.best_model_checkpoint is not None
    same(surgery.restore(used.state.best_model_checkpoint), model)


def test_a_merged_model_is_saved_as_its_library_does(source: Path, tmp_path: Path):
    model = rewritten(source, "lora")
    used = trainer(model, tmp_path)
    used.train()
    surgery.adapters.merge(model)
    used.save_model(str(tmp_path / "merged"))
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(5, 11).unsqueeze(0)
    assert torch.equal(stock(ids).logits, model.eval()(ids).logits)


def test_training_goes_on_with_the_optimizer_it_has(source: Path, tmp_path: Path):
    model = rewritten(source, "reflora", **METHODS["reflora"])
    used = trainer(model, tmp_path, save_strategy="no")
    used.train()
    first = plain(used.optimizer)
    used.train()
    assert plain(used.optimizer) is first


def test_what_rules_kept_has_to_be_of_the_checkpoint(source: Path, tmp_path: Path):
    options: dict[str, Any] = {"options": {"warmup": 1}}
    trainer(rewritten(source, "reflora", **options), tmp_path).train()
    again = tmp_path / "checkpoint-4"
    for ending in ("json", "safetensors"):
        taken = tmp_path / "checkpoint-2" / f"surgery-rules.{ending}"
        taken.replace(again / taken.name)
    with pytest.raises(CheckpointError, match="is of another checkpoint"):
        trainer(rewritten(source, "reflora", **options), tmp_path).train(
            resume_from_checkpoint=str(again)
        )
    (again / "surgery-rules.json").unlink()
    with pytest.raises(CheckpointError, match="does not hold what the step rules"):
        trainer(rewritten(source, "reflora", **options), tmp_path).train(
            resume_from_checkpoint=str(again)
        )


def test_a_model_as_it_came_is_refused(source: Path, tmp_path: Path):
    model = BertForSequenceClassification.from_pretrained(source, num_labels=2)
    with pytest.raises(ModelStateError, match="BertForSequenceClassification as it came"):
        trainer(model, tmp_path)


def test_a_penalty_that_nothing_adds_is_refused(source: Path, tmp_path: Path):
    model = rewritten(source, "sorsa")
    with pytest.raises(ModelStateError, match="adds a penalty to the loss"):
        trainer(model, tmp_path).train()
    trainer(
        model, tmp_path, callbacks=[SurgeryCallback(penalty_added=True)], save_strategy="no"
    ).train()
