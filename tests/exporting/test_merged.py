"""Merged exports: stock ``from_pretrained`` loads them, with the names of the original."""

from __future__ import annotations

import copy
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery import LowRank, Path, Role, Rule, adapters
from surgery.errors import ExportError
from surgery.exporting import Exported, outputs
from tests import zoo
from tests.interchange.peers import CLOSE, apart, stirred

pytestmark = [
    # torchao and diffusers announce changes of other libraries while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QKV = Role("attention.qkv")
MODELS = [
    "llama",
    "gpt2",
    "mixtral",
    "bert",
    "t5",
    "vit",
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "timm_vit",
    "timm_convnext",
]
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def adapted(name: str, *rules: Rule) -> tuple[Any, Any, Any]:
    """A model with random adapters, its example, and the stock model."""
    model, example = zoo.build(name)
    stock = copy.deepcopy(model)
    surgery.apply(model, list(rules) or Rule(LowRank(rank=2)), example=example)
    return stirred(model), example, stock


def export(model: nn.Module, folder: FilePath, example: Any, **options: Any) -> Exported:
    return surgery.export(model, folder, format="merged", example=example, **options)


def loaded(stock: Any, folder: FilePath) -> Any:
    if hasattr(stock, "from_pretrained"):
        return type(stock).from_pretrained(folder).eval()
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_stock_class_loads_it(name: str, tmp_path: FilePath) -> None:
    model, example, stock = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export(model, tmp_path / "merged", example)
    # The model keeps its adapters beside its weights.
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert apart(stock, model, example) > 1e-3
    found = loaded(stock, tmp_path / "merged")
    assert type(found) is type(stock)
    assert apart(model, found, example) < CLOSE
    assert list(found.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("name", ["llama", "mixtral", "SD3Transformer2DModel"])
def test_the_file_has_the_names_of_the_original(name: str, tmp_path: FilePath) -> None:
    model, example, stock = adapted(name)
    export(model, tmp_path / "merged", example)
    stock.save_pretrained(tmp_path / "stock")
    (file,) = (each for each in WEIGHTS if (tmp_path / "stock" / each).exists())
    ours, theirs = (load_file(tmp_path / folder / file) for folder in ("merged", "stock"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].shape == theirs[key].shape for key in theirs)
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_adapter_that_added_to_its_weight(tmp_path: FilePath) -> None:
    model, example, stock = adapted("llama", Rule(LowRank(method="scalora", rank=2), where=QKV))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    export(model, tmp_path, example)
    assert apart(model, loaded(stock, tmp_path), example) < CLOSE


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_methods_that_are_no_plain_sum(method: str, tmp_path: FilePath) -> None:
    model, example, stock = adapted("llama", Rule(LowRank(method=method, rank=2), where=QKV))
    export(model, tmp_path, example)
    assert apart(model, loaded(stock, tmp_path), example) < CLOSE


def test_what_is_active_is_merged_with_its_share(tmp_path: FilePath) -> None:
    rules = [
        Rule(LowRank(rank=2, adapter="a"), where=QKV),
        Rule(LowRank(rank=2, adapter="b"), where=QKV),
    ]
    model, example, stock = adapted("llama", *rules)
    adapters.activate(model, {"a": 0.7, "b": 0.2})
    export(model, tmp_path / "mix", example)
    assert apart(model, loaded(stock, tmp_path / "mix"), example) < CLOSE
    export(model, tmp_path / "b", example, adapter="b")
    with adapters.using(model, "b"):
        assert apart(model, loaded(stock, tmp_path / "b"), example) < CLOSE


def test_a_model_whose_adapters_are_merged_already(tmp_path: FilePath) -> None:
    model, example, stock = adapted("llama")
    adapters.merge(model)
    export(model, tmp_path / "out", example)
    assert apart(model, loaded(stock, tmp_path / "out"), example) == 0.0
    assert adapters.merged(model) == {"default": 1.0}
    adapters.unmerge(model)
    adapters.merge(model, {"default": 0.5})
    with pytest.raises(ExportError, match="is merged into the weights"):
        export(model, tmp_path / "other", example, adapter="default")


def test_bfloat16_is_rounded_once(tmp_path: FilePath) -> None:
    model, example = zoo.build("llama")
    model.bfloat16()
    surgery.apply(model, Rule(LowRank(rank=2, dtype="float32"), where=Path("**.q_proj")))
    stirred(model)
    export(model, tmp_path, example)
    layer = model.model.layers[0].self_attn.q_proj
    factors = layer.lowrank.default
    sum_ = layer.weight.float() + factors.scaling * (factors.lora_B @ factors.lora_A)
    found = loaded(model, tmp_path).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(found, sum_.bfloat16())


def test_a_stock_model_is_written_as_it_is(tmp_path: FilePath) -> None:
    model, example = zoo.build("bert")
    export(model, tmp_path, example)
    assert apart(model, loaded(model, tmp_path), example) == 0.0


def test_a_model_that_no_stock_class_computes(tmp_path: FilePath) -> None:
    model, example = zoo.build("bert")
    surgery.apply(model, [Rule(LowRank(), where=QKV), Rule(surgery.Shortcuts())], example=example)
    with pytest.raises(ExportError, match="which the stock class does not compute"):
        export(model, tmp_path, example)
    own = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ExportError, match="is not one of transformers"):
        export(own, tmp_path, torch.ones(1, 2))


def test_a_weight_that_cannot_be_merged_into(tmp_path: FilePath) -> None:
    model, example, _ = adapted("llama", Rule(LowRank(rank=2), where=Path("**.q_proj")))
    layer = model.model.layers[0].self_attn.q_proj
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert outputs(model, example)
    with pytest.raises(ExportError, match="parametriz"):
        export(model, tmp_path, example)
