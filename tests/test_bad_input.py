"""Bad input from end to end: what a person reads when something is wrong.

Each case goes through the public functions alone and is held to the words that matter: what was
received, what was expected, where, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path as FilePath

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery import Recipe, SurgeryError


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def rules(text: str) -> Callable[[FilePath], object]:
    def run(folder: FilePath) -> object:
        path = folder / "rules.yaml"
        path.write_text(f"version: 1\nrules:\n{text}")
        return surgery.plan(model(), path)

    return run


RULES = [
    ("unknown pass", "  - pass: lowrnk\n", [":3:", "'lowrnk'", "lowrank"]),
    ("unknown key", "  - pass: lowrank\n    wher: {path: '*'}\n", [":4:5", "'wher'", "'where'"]),
    ("unknown option", "  - pass: lowrank\n    with: {rnak: 4}\n", [":4:", "'rnak'", "'rank'"]),
    (
        "unknown role",
        "  - pass: lowrank\n    where: {role: attention.qq}\n",
        [":4:", "'attention.qq'", "attention.q"],
    ),
    ("wrong type", "  - pass: lowrank\n    with: {rank: '4'}\n", [":4:", "rank", "'4'"]),
    (
        "duplicate key",
        "  - pass: lowrank\n    with: {rank: 4, rank: 5}\n",
        [":4:21", "'rank' appears twice", "line 4"],
    ),
    ("rank 0", "  - pass: lowrank\n    with: {rank: 0}\n", [":4:", "rank", "0"]),
    ("rank negative", "  - pass: lowrank\n    with: {rank: -3}\n", [":4:", "rank", "-3"]),
    (
        "rank larger than the matrix",
        "  - pass: lowrank\n    with: {rank: 9}\n",
        ["rank 9", "0", "16", "8"],
    ),
    (
        "path that matches nothing",
        "  - pass: lowrank\n    where: {path: '7.weigth'}\n",
        ["matched nothing", "0", "inspect"],
    ),
    (
        "two rules on one site",
        "  - pass: lowrank\n    id: one\n  - pass: lowrank\n    id: two\n",
        ["'one'", "'two'", "0"],
    ),
]


@pytest.mark.parametrize(("text", "words"), [r[1:] for r in RULES], ids=[r[0] for r in RULES])
def test_rule_file(tmp_path: FilePath, text: str, words: list[str]) -> None:
    with pytest.raises(SurgeryError) as raised:
        rules(text)(tmp_path)
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message


@pytest.fixture
def bert(tmp_path: FilePath) -> FilePath:
    """A tiny BERT in the hub's layout, in several shards."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=40,
        max_position_embeddings=16,
    )
    folder = tmp_path / "bert"
    transformers.BertModel(config).save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def first_shard(folder: FilePath) -> FilePath:
    return min(folder.glob("*.safetensors"))


def truncate(folder: FilePath) -> FilePath:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard


def remove(folder: FilePath) -> FilePath:
    shard = first_shard(folder)
    shard.unlink()
    return shard


def drop_from_index(folder: FilePath) -> FilePath:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    gone = first_shard(folder).name
    data["weight_map"] = {k: shard for k, shard in data["weight_map"].items() if shard != gone}
    index.write_text(json.dumps(data))
    return first_shard(folder)


def only_pickle(folder: FilePath) -> FilePath:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    target = folder / "pytorch_model.bin"

    class Hostile:
        def __reduce__(self) -> object:
            return (FilePath.touch, (folder / "pwned",))

    torch.save({"w": Hostile()}, target)
    return target


def other_shape(folder: FilePath) -> str:
    shard = first_shard(folder)
    tensors = load_file(shard)
    name = min(tensors)
    tensors[name] = torch.zeros(3, 3)
    save_file(tensors, shard, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    "damage",
    [truncate, remove, drop_from_index, only_pickle, other_shape],
    ids=lambda f: f.__name__,
)
def test_checkpoint(bert: FilePath, damage: Callable[[FilePath], object]) -> None:
    culprit = damage(bert)
    with pytest.raises(SurgeryError) as raised:
        surgery.load(str(bert))
    message = str(raised.value)
    name = culprit.name if isinstance(culprit, FilePath) else str(culprit)
    words = [name] if damage is not drop_from_index else ["index"]
    assert [word for word in words if word not in message] == [], message
    assert not (bert / "pwned").exists()


def test_nan_in_weights_is_found_and_named() -> None:
    broken = model()
    surgery.apply(broken, Recipe.loads("version: 1\nrules: [{pass: lowrank, with: {rank: 2}}]"))
    with torch.no_grad():
        broken[2].weight[1, 3] = float("nan")
    report = surgery.verify(broken, example=torch.randn(2, 8))
    assert not report.ok
    assert "2.weight" in str(report)
    with pytest.raises(surgery.ContractBroken, match=r"2\.weight"):
        report.check()


def test_peft_wrapped_model_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(surgery.Conflict, match=r"(?s)peft.*merge_and_unload"):
        surgery.plan(wrapped, Recipe.loads("version: 1\nrules: [{pass: lowrank}]"))


def test_parametrised_weight_is_adapted_but_not_merged() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    wrapped = model()
    weight_norm(wrapped[0])
    x = torch.randn(2, 8)
    before = wrapped(x)
    surgery.apply(wrapped, Recipe.loads("version: 1\nrules: [{pass: lowrank, with: {rank: 2}}]"))
    assert torch.equal(wrapped(x), before)
    with pytest.raises(SurgeryError, match=r"0.*parametri"):
        surgery.adapters.merge(wrapped)
    surgery.undo(wrapped)
    assert torch.equal(wrapped(x), before)
