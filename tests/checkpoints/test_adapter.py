"""Adapter-only saves: what was inserted, and the hash of the stock weights it belongs to."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import surgery
from surgery import LowRank, Path, Rule, adapters
from surgery.errors import CheckpointError
from surgery.sources import Example
from surgery.verification.outputs import compare, leaves
from tests import zoo
from tests.verify.rewrites import Graft, Round


def trained(model: nn.Module, *rules: Rule) -> nn.Module:
    surgery.apply(model, list(rules) or Rule(LowRank(rank=2)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lowrank" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def call(model: nn.Module, example: Example) -> dict[str, Any]:
    with torch.no_grad():
        return leaves(model(*example.args, **example.kwargs))


def same(one: nn.Module, other: nn.Module, example: Example) -> bool:
    return compare(call(one, example), call(other, example), rtol=0.0, atol=0.0).equal


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral", "timm_swin"])
def test_onto_the_stock_model(name: str, tmp_path: FilePath) -> None:
    model, example = zoo.build(name)
    trained(model)
    folder = surgery.save(model, tmp_path / "out", adapter_only=True)
    stock, _ = zoo.build(name)
    restored = surgery.restore(folder, model=stock)
    assert restored is stock
    assert same(model, restored, example)
    assert list(restored.state_dict()) == list(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in restored.named_parameters()}
    surgery.undo(restored)
    assert same(zoo.build(name)[0], restored, example)


def test_the_folder_holds_only_what_was_inserted(tmp_path: FilePath) -> None:
    model, _ = zoo.build("bert")
    before = set(model.state_dict())
    trained(model)
    folder = surgery.save(model, tmp_path / "out", adapter_only=True)
    assert {each.name for each in folder.iterdir()} == {
        "surgery.json",
        "recipe.yaml",
        "adapter.safetensors",
    }
    tensors = safetensors.torch.load_file(folder / "adapter.safetensors")
    assert set(tensors) == set(model.state_dict()) - before
    data = json.loads((folder / "surgery.json").read_text())
    assert data["kind"] == "adapter"
    assert set(data["base"]["tensors"]) == before


def test_other_stock_weights_are_refused_unless_allowed(tmp_path: FilePath) -> None:
    model, example = zoo.build("bert")
    folder = surgery.save(trained(model), tmp_path / "out", adapter_only=True)
    other, _ = zoo.build("bert", seed=1)
    keys = list(other.state_dict())
    with pytest.raises(CheckpointError, match=r"other stock weights: \d+ of \d+ .*embeddings"):
        surgery.restore(folder, model=other)
    assert list(other.state_dict()) == keys
    restored = surgery.restore(folder, model=other, allow_other_base=True)
    ours, theirs = dict(model.named_parameters()), dict(restored.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "lowrank" in name)
    assert not same(model, restored, example)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pooler.dense.bias.data[3].add_(1e-6), r"1 of \d+ .*pooler\.dense\.bias"),
        (lambda m: m.to(torch.bfloat16), r"torch\.bfloat16"),
        (lambda m: setattr(m, "pooler", None), "another model: the model has no pooler"),
        (lambda m: m.add_module("extra", nn.Linear(2, 2)), r"adapter knows no extra\.weight"),
    ],
)
def test_the_slightest_difference_is_noticed(change: Any, said: str, tmp_path: FilePath) -> None:
    model, _ = zoo.build("bert")
    folder = surgery.save(trained(model), tmp_path / "out", adapter_only=True)
    other, _ = zoo.build("bert")
    change(other)
    with pytest.raises(CheckpointError, match=said):
        surgery.restore(folder, model=other)


def test_the_stock_model_must_be_given(tmp_path: FilePath) -> None:
    model, _ = zoo.build("bert")
    folder = surgery.save(trained(model), tmp_path / "out", adapter_only=True)
    with pytest.raises(CheckpointError, match=r"holds an adapter of a .*BertModel") as info:
        surgery.restore(folder)
    assert "surgery.restore(folder, model=...)" in info.value.hint


def test_several_adapters_and_their_mix(tmp_path: FilePath) -> None:
    model, example = zoo.build("bert")
    trained(model, Rule(LowRank(rank=2), id="a"), Rule(LowRank(rank=1, adapter="b"), id="b"))
    adapters.activate(model, {"default": 0.5, "b": 0.75})
    folder = surgery.save(model, tmp_path / "out", adapter_only=True)
    restored = surgery.restore(folder, model=zoo.build("bert")[0])
    assert adapters.active(restored) == {"default": 0.5, "b": 0.75}
    assert same(model, restored, example)


def test_merged_adapters_are_refused(tmp_path: FilePath) -> None:
    model, _ = zoo.build("bert")
    trained(model)
    adapters.merge(model)
    with pytest.raises(CheckpointError, match="is merged into the stock weight") as info:
        surgery.save(model, tmp_path / "out", adapter_only=True)
    assert "unmerge" in info.value.hint
    adapters.unmerge(model)
    surgery.save(model, tmp_path / "out", adapter_only=True)


def test_a_pass_that_changed_stock_weights_belongs_to_the_original_ones(
    tmp_path: FilePath,
) -> None:
    model, example = zoo.build("bert")
    surgery.apply(model, [Rule(Round(), where=Path("**.query")), Rule(Graft())])
    folder = surgery.save(model, tmp_path / "out", adapter_only=True)
    restored = surgery.restore(folder, model=zoo.build("bert")[0])
    assert same(model, restored, example)


def test_without_rewrites_there_is_no_adapter(tmp_path: FilePath) -> None:
    with pytest.raises(CheckpointError, match="no adapter to save"):
        surgery.save(zoo.build("bert")[0], tmp_path / "out", adapter_only=True)


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(32, 32)
        self.two = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


@pytest.mark.filterwarnings("ignore::UserWarning:torchao")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao")
def test_a_quantised_base(tmp_path: FilePath) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def base(seed: int = 0) -> nn.Module:
        model = zoo.perturb(Quantised(), seed=seed).eval()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.normal_()
        quantize_(model, Int8WeightOnlyConfig())
        return model

    model = trained(base())
    with pytest.raises(CheckpointError, match=r"one\.weight is quantised") as info:
        surgery.save(model, tmp_path / "whole")
    assert "adapter_only=True" in info.value.hint
    assert not (tmp_path / "whole").exists()
    folder = surgery.save(model, tmp_path / "out", adapter_only=True)
    x = Example((torch.randn(3, 32),))
    assert same(model, surgery.restore(folder, model=base()), x)
    with pytest.raises(CheckpointError, match="other stock weights"):
        surgery.restore(folder, model=base(seed=1))
