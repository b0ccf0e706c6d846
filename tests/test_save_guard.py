"""``save_pretrained`` never writes a folder that the stock class loads as the old architecture."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import LowRank, Path, Rule, adapters
from surgery.capture.graft import grafts
from surgery.errors import ExportError
from surgery.save_guard import GuardedModel
from surgery.verification.outputs import compare, leaves
from tests import zoo

MODELS = ["llama", "bert", "gpt2", "UNet2DConditionModel", "AutoencoderKL"]


def rewritten(name: str, where: surgery.Where | None = None) -> tuple[nn.Module, Any]:
    model, example = zoo.build(name)
    surgery.apply(model, Rule(LowRank(rank=2), where=where))
    with torch.no_grad():
        for parameter in adapters.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, example


def call(model: nn.Module, example: Any) -> dict[str, Any]:
    with torch.no_grad():
        return leaves(model(*example.args, **example.kwargs))


@pytest.mark.parametrize("name", MODELS)
def test_refused_while_a_rewrite_is_in_force(name: str, tmp_path: FilePath) -> None:
    model, _ = rewritten(name)
    with pytest.raises(ExportError, match="loads as the model without its rewrites") as info:
        model.save_pretrained(tmp_path / "out")
    assert "surgery.save(model, folder)" in info.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MODELS)
def test_works_again_after_undo(name: str, tmp_path: FilePath) -> None:
    model, example = zoo.build(name)
    stock, cls = call(model, example), type(model)
    surgery.apply(model, Rule(LowRank(rank=2)))
    surgery.undo(model)
    assert type(model) is cls
    model.save_pretrained(tmp_path / "out")
    loaded = cls.from_pretrained(tmp_path / "out").eval()
    assert compare(stock, call(loaded, example), rtol=0.0, atol=0.0).equal


@pytest.mark.parametrize("name", MODELS)
def test_writes_the_stock_tensors_after_a_merge(name: str, tmp_path: FilePath) -> None:
    model, example = zoo.build(name)
    keys, cls = list(model.state_dict()), type(model)
    model, example = rewritten(name)
    adapters.merge(model)
    merged = call(model, example)
    model.save_pretrained(tmp_path / "out")
    loaded = cls.from_pretrained(tmp_path / "out").eval()
    assert compare(merged, call(loaded, example), rtol=0.0, atol=0.0).equal
    assert list(loaded.state_dict()) == keys
    assert any("lowrank" in key for key in model.state_dict())  # hidden for the save only


def test_refused_if_only_some_sites_are_merged(tmp_path: FilePath) -> None:
    model, _ = rewritten("bert", Path("**.query"))
    adapters.merge(model)
    surgery.apply(model, Rule(LowRank(rank=2), where=Path("**.value"), id="more"))
    with pytest.raises(ExportError, match=r"encoder\.layer\.0\.attention\.self\.value"):
        model.save_pretrained(tmp_path / "out")


def test_a_part_is_guarded_too(tmp_path: FilePath) -> None:
    model, _ = rewritten("llama", Path("model.layers.**"))
    with pytest.raises(ExportError, match="this LlamaModel is a part of a rewritten model"):
        model.model.save_pretrained(tmp_path / "out")
    surgery.undo(model)
    model.model.save_pretrained(tmp_path / "out")


def test_a_part_without_a_rewrite_is_not_guarded(tmp_path: FilePath) -> None:
    model, _ = rewritten("llama", Path("lm_head"))
    model.model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_undoing_one_of_two_keeps_the_guard(tmp_path: FilePath) -> None:
    model, _ = rewritten("bert", Path("**.query"))
    surgery.apply(model, Rule(LowRank(rank=2, adapter="second"), where=Path("**.value")))
    surgery.undo(model, last=1)
    with pytest.raises(ExportError):
        model.save_pretrained(tmp_path / "out")


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - written in this line


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_are_guarded(duplicate: Any, tmp_path: FilePath) -> None:
    copied = duplicate(rewritten("bert")[0])
    with pytest.raises(ExportError):
        copied.save_pretrained(tmp_path / "out")
    surgery.undo(copied)
    copied.save_pretrained(tmp_path / "out")


def test_the_class_keeps_its_name() -> None:
    model, _ = rewritten("llama")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__.startswith("transformers.")


def test_a_model_that_cannot_save_itself_gets_no_such_method() -> None:
    model, _ = rewritten("timm_vit")
    with pytest.raises(AttributeError):
        model.save_pretrained("out")
    assert GuardedModel not in grafts(model)
