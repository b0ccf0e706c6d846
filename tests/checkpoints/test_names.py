"""The key map: names before and after a rewrite, and in what the model's library publishes."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery import LowRank, Path, Rule, Shortcuts, Type
from surgery.checkpoints.inventory import places
from surgery.checkpoints.names import keymap
from surgery.errors import CheckpointError
from surgery.record import record_of
from tests import zoo

MODELS = [
    "llama",
    "gpt2",
    "t5",
    "mixtral",
    "qwen3_moe",
    "whisper",
    "timm_swin",
    "timm_efficientnet",
    "SD3Transformer2DModel",
    "AutoencoderKL",
]
PUBLISHING = ["gpt2", "t5", "mixtral", "qwen3_moe", "whisper", "AutoencoderKL"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def unique(model: nn.Module) -> dict[str, Tensor]:
    """The stock state dict, tied tensors once."""
    names = keymap(model)
    return {n: t for n, t in names.to_stock(model.state_dict()).items() if n not in names.tied}


@pytest.mark.parametrize("name", MODELS)
def test_every_name_is_there_once_and_the_way_back_is_the_identity(name: str) -> None:
    model, _ = zoo.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    surgery.apply(model, Rule(LowRank(rank=2), id="adapters"))
    names = keymap(model)
    assert [entry.name for entry in names.entries if entry.persistent] == [
        *(entry.name for entry in names.entries if entry.tied_to is None and entry.persistent),
        *names.tied,
    ]
    assert {entry.name for entry in names.entries} == {name for name, _ in places(model)}
    record = record_of(model)
    assert record is not None
    assert set(record.added) <= set(names.new)
    assert set(names.new.values()) == {"adapters"}
    assert set(names.transient) == {n for n, place in places(model) if not place.persistent}
    stock = names.to_stock(model.state_dict())
    assert same(stock, before)
    assert same(names.from_stock(before), before)
    state = unique(model)
    assert same(names.load(names.publish(state)), state)
    assert not names.missing
    assert not names.unknown
    assert not names.gone


@pytest.mark.parametrize("name", PUBLISHING)
def test_what_is_published_is_what_save_pretrained_writes(name: str, tmp_path: FilePath) -> None:
    model, _ = zoo.build(name)
    cast("Any", model).save_pretrained(tmp_path)
    written = load_file(next(tmp_path.glob("*.safetensors")))
    surgery.apply(model, Rule(LowRank(rank=2)))
    names = keymap(model)
    assert same(names.publish(unique(model)), written)
    held = keymap(model, tmp_path)
    held.check()
    assert same(held.load(written), unique(model))


def test_parts_say_where_each_expert_lies() -> None:
    model, _ = zoo.build("mixtral")
    names, state = keymap(model), model.state_dict()
    published = names.publish(unique(model))
    parts = {key: part for link in names.links for key, part in link.parts.items()}
    experts = [key for key in published if ".experts." in key]
    assert set(parts) == set(experts)
    for key, part in parts.items():
        assert torch.equal(state[part.name][part.index], published[key])
    fused = next(link for link in names.links if link.names[0].endswith("gate_up_proj"))
    assert "MergeModulelist" in fused.operation


@settings(max_examples=8, deadline=None)
@given(
    experts=st.integers(1, 5),
    width=st.sampled_from([4, 8, 12]),
    inner=st.integers(1, 7),
    layers=st.integers(1, 2),
    seed=st.integers(0, 3),
)
def test_fused_experts_of_any_size_come_back(
    experts: int, width: int, inner: int, layers: int, seed: int
) -> None:
    fields = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 11,
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
    }
    model = surgery.load("transformers:MixtralForCausalLM", config=fields, device="meta")
    draw = torch.Generator().manual_seed(seed)
    names = keymap(model)
    like = {n: t for n, t in model.state_dict().items() if n not in names.tied}
    state = {name: torch.randn(t.shape, generator=draw) for name, t in like.items()}
    published = names.publish(state)
    assert len(published) == len(state) + layers * (3 * experts - 2)
    assert same(names.load(published), state)
    whole = keymap(model, published)
    whole.check()
    assert same(whole.load(published), state)
    lacking = dict(published)
    gone = sorted(lacking)[seed % len(lacking)]
    del lacking[gone]
    with pytest.raises(CheckpointError, match=r"which is not there"):
        keymap(model, lacking).check()


def test_tied_weights_are_one_tensor_with_two_names() -> None:
    model, _ = zoo.build("gpt2")
    surgery.apply(model, Rule(LowRank(rank=2), where=Type("Embedding")))
    names = keymap(model)
    assert names.tied["lm_head.weight"] == "transformer.wte.weight"
    head = names.by_name["lm_head.weight"]
    assert head.keys == names.by_name["transformer.wte.weight"].keys
    assert head.stock == "lm_head.weight"
    adapter = names.by_name["lm_head.lowrank.default.lora_A"]
    assert adapter.tied_to == "transformer.wte.lowrank.default.lora_A"
    assert adapter.stock is None
    assert adapter.rule == "lowrank"
    either = names.publish(unique(model))
    moved = {("lm_head.weight" if "wte" in key else key): t for key, t in either.items()}
    keymap(model, moved).check()


def test_rewritten_twice_sliced_and_undone() -> None:
    model, example = zoo.build("timm_vit")
    stock = keymap(model)
    surgery.apply(model, Rule(Shortcuts(topology="ancre"), id="first"), example=example)
    sliced = LowRank(rank=2, slices=("q", "v"))
    where = Path("blocks.*.attn.qkv")
    surgery.apply(model, Rule(sliced, where=where, id="second"), example=example)
    names = keymap(model)
    assert set(names.new.values()) == {"first", "second"}
    assert any(name.endswith("lowrank.default.q.lora_A") for name in names.new)
    assert [e.name for e in names.entries if e.stock] == [e.name for e in stock.entries]
    surgery.undo(model, last=1)
    assert set(keymap(model).new.values()) == {"first"}
    surgery.undo(model)
    assert keymap(model).entries == stock.entries


def test_a_checkpoint_of_the_base_model_and_of_an_old_version(tmp_path: FilePath) -> None:
    model, _ = zoo.build("bert")
    cast("Any", model).save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in written.items()
    }
    assert set(old) != set(written)
    assert same(keymap(model, old).load(old), keymap(model, written).load(written))
    prefix = cast("Any", model).base_model_prefix
    wrapped = {f"{prefix}.{key}": value for key, value in written.items()}
    names = keymap(model, wrapped)
    names.check()
    assert same(names.load(wrapped), keymap(model, written).load(written))


def test_keys_of_old_versions_of_diffusers() -> None:
    model, _ = zoo.build("AutoencoderKL")
    state = model.state_dict()
    swaps = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = dict(state)
    for new, before in swaps.items():
        old = {key.replace(f".{new}.", f".{before}."): value for key, value in old.items()}
    assert set(old) != set(state)
    names = keymap(model, old)
    names.check()
    assert same(names.load(old), state)


BROKEN: dict[str, tuple[Any, str]] = {
    "missing": (lambda s: s.pop("lm_head.weight"), r"the model needs lm_head\.weight, which is"),
    "unknown": (lambda s: s.update(extra=torch.zeros(1)), r"the model has no place for extra"),
    "expert": (
        lambda s: s.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"),
        r"needs model\.layers\.1\.block_sparse_moe\.experts\.2\.w2\.weight, which is not there",
    ),
    "shape": (
        lambda s: s.update({"model.norm.weight": torch.zeros(3)}),
        r"model\.norm\.weight is made of model\.norm\.weight as \(3,\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named_by_its_key(case: str) -> None:
    model, _ = zoo.build("mixtral")
    state = keymap(model).publish(unique(model))
    spoil, message = BROKEN[case]
    spoil(state)
    with pytest.raises(CheckpointError, match=message):
        keymap(model, state).check()


def test_a_key_twice_is_refused() -> None:
    model, _ = zoo.build("bert")
    state = unique(model)
    norm = next(name for name in state if name.endswith("LayerNorm.weight"))
    with pytest.raises(CheckpointError, match="are both"):
        keymap(model, {**state, norm.replace("weight", "gamma"): state[norm]})


def test_state_dicts_that_lack_or_have_too_much_are_refused() -> None:
    model, _ = zoo.build("llama")
    surgery.apply(model, Rule(LowRank(rank=2), where=Type("Linear")))
    names, state = keymap(model), model.state_dict()
    with pytest.raises(CheckpointError, match=r"the model has no surplus"):
        names.to_stock({**state, "surplus": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"it lacks model\.norm\.weight"):
        names.to_stock({n: t for n, t in state.items() if n != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"the model has no .*lora_A"):
        names.from_stock(state)


def test_a_class_of_the_users_own_maps_names_to_themselves() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    surgery.apply(model, Rule(LowRank(rank=2), where=Type("Linear")))
    names = keymap(model)
    assert set(names.by_key) == set(names.stock)
    assert "lowrank" in str(names)
    assert names.to_dict()["entries"][0]["keys"] == ["0.weight"]
