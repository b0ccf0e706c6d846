"""A converted folder is what load, apply and save give, in every byte but where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm.models
import torch
from torch import nn

import surgery
from surgery import LowRank, Recipe, Role, Rule, Shortcuts, Stack
from surgery import Path as At
from tests.zoo import build, perturb

# By path where what is selected does not matter: a role is found by tracing the forward.
QKV, DOWN = At("model.layers.*.self_attn.*_proj"), At("model.layers.*.mlp.down_proj")
LORA = Rule(LowRank(rank=2, alpha=4), where=Role("attention.qkv"))
LLAMA, GPT2, MIXTRAL = "llama", "gpt2", "mixtral"
DIT = "DiTTransformer2DModel"

#: Name → model, rules, options of convert.
CASES: dict[str, tuple[str, list[Rule], dict[str, Any]]] = {
    "lora": (LLAMA, [LORA], {"max_shard_size": "8KB"}),
    "dora": (LLAMA, [Rule(LowRank(method="dora", rank=2), where=QKV)], {}),
    "pissa": (LLAMA, [Rule(LowRank(method="pissa", rank=2), where=QKV)], {}),
    "pissa-cast": (
        LLAMA,
        [Rule(LowRank(method="pissa", rank=2), where=QKV)],
        {"dtype": "bfloat16", "max_shard_size": "8KB"},
    ),
    "olora-source": (
        LLAMA,
        [Rule(LowRank(method="olora", rank=2, keep_base="source"), where=QKV)],
        {},
    ),
    "scalora-for-good": (
        LLAMA,
        [Rule(LowRank(method="scalora", rank=2, keep_base="none"), where=QKV)],
        {},
    ),
    "two-of-one-weight": (
        LLAMA,
        [
            Rule(LowRank(method="pissa", rank=2, adapter="a"), where=QKV),
            Rule(LowRank(method="sorsa", rank=2, adapter="b"), where=QKV),
            Rule(LowRank(method="nora", rank=2), where=DOWN),
        ],
        {},
    ),
    "everything": (LLAMA, [Rule(LowRank(method="pissa", rank=2))], {}),
    "shortcuts": (LLAMA, [Rule(Shortcuts(init="identity")), LORA], {}),
    "transposed": (
        GPT2,
        [Rule(LowRank(method="pissa", rank=2), where=At("transformer.h.*.mlp.c_fc"))],
        {},
    ),
    "slices": (
        GPT2,
        [Rule(LowRank(rank=2, slices=("q", "v")), where=At("transformer.h.*.attn.c_attn"))],
        {},
    ),
    "experts": (
        MIXTRAL,
        [Rule(LowRank(method="pissa", rank=2), where=At("model.layers.*.mlp.experts.*"))],
        {},
    ),
    "diffusers": (
        DIT,
        [Rule(LowRank(rank=2), where=Role("attention.qkv"))],
        {"max_shard_size": "50KB", "dtype": "bfloat16"},
    ),
}


def saved(name: str, folder: Path) -> Path:
    """A tiny model as its library saves it, in shards."""
    model, _ = build(name)
    model.save_pretrained(folder, max_shard_size="10KB")  # type: ignore[operator]
    return folder


def same_but_origin(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name != "surgery.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    told = [json.loads((each / "surgery.json").read_text()) for each in (one, other)]
    assert told[0].pop("origin") is not None
    for each in told:
        each.pop("checksum")
    assert told[0] == told[1]


def in_memory(source: Path, rules: list[Rule], out: Path, **options: Any) -> nn.Module:
    """Load, apply, save."""
    model = surgery.load(source, dtype=options.pop("dtype", None))
    surgery.apply(model, Recipe(rules=rules, recipe="test", seed=5))
    surgery.save(model, out, **options)
    return model


@pytest.mark.parametrize("case", CASES)
def test_equals_load_apply_save(case: str, tmp_path: Path) -> None:
    name, rules, options = CASES[case]
    source = saved(name, tmp_path / "source")
    before = {path: path.read_bytes() for path in source.iterdir()}
    in_memory(source, rules, tmp_path / "wanted", **options)
    recipe = Recipe(rules=rules, recipe="test", seed=5)
    done = surgery.convert(source, recipe, tmp_path / "got", threads=2, **options)
    same_but_origin(tmp_path / "got", tmp_path / "wanted")
    assert done.kind == "saved model"
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "source", "wanted"]


def test_of_timm_with_running_statistics(tmp_path: Path) -> None:
    model = perturb(surgery.load("timm:resnet18", config={"num_classes": 5})).eval()
    timm.models.save_for_hf(model, str(tmp_path / "source"), safe_serialization=True)  # type: ignore[arg-type]
    rules = [Rule(LowRank(rank=2), where=At("layer4.*.conv1"))]
    in_memory(tmp_path / "source", rules, tmp_path / "wanted")
    surgery.convert(tmp_path / "source", Recipe(rules=rules, recipe="test", seed=5), tmp_path / "g")
    same_but_origin(tmp_path / "g", tmp_path / "wanted")


def test_is_restored_undone_and_verified(tmp_path: Path) -> None:
    source = saved(LLAMA, tmp_path / "source")
    rules = [Rule(LowRank(method="pissa", rank=2), where=QKV)]
    surgery.convert(source, Recipe(rules=rules, recipe="test"), tmp_path / "got")
    again = surgery.restore(tmp_path / "got")
    assert surgery.verify(again).ok
    stock = surgery.load(source)
    surgery.undo(again)
    wanted = stock.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


def test_after_a_merge_is_two_conversions_in_a_row(tmp_path: Path) -> None:
    source = saved(LLAMA, tmp_path / "source")
    model = surgery.apply(surgery.load(source), LORA)
    with torch.no_grad():
        for parameter in surgery.adapters.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    surgery.save(model, tmp_path / "adapter", adapter_only=True)
    rules = Recipe(rules=[Rule(LowRank(method="pissa", rank=2), where=QKV)], recipe="test")
    surgery.convert(source, None, tmp_path / "merged", adapter=tmp_path / "adapter")
    surgery.convert(tmp_path / "merged", rules, tmp_path / "wanted")
    surgery.convert(source, rules, tmp_path / "got", adapter=tmp_path / "adapter")
    for name in ("model", "kept", "buffers"):
        file = f"{name}.safetensors"
        assert (tmp_path / "got" / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()


def test_stack_rule_reaches_the_same_sites_on_meta(tmp_path: Path) -> None:
    source = saved(LLAMA, tmp_path / "source")
    rule = Rule(LowRank(rank=2), where=Stack("all"))
    wanted = surgery.plan(surgery.load(source), rule)
    surgery.convert(source, rule, tmp_path / "got")
    log = json.loads((tmp_path / "got" / "surgery.json").read_text())["record"]
    sites = [edit["site"] for edit in log["operations"][0]["edits"]]
    assert sites == [edit.site for edit in wanted.edits]
