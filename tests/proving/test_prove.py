"""``surgery verify --against``: every file and every tensor is accounted for, or named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import surgery
from surgery import LowRank, Rule, Shortcuts, Type, adapters
from surgery.cli import app
from surgery.errors import CheckpointError, ContractBroken, ExportError
from surgery.exporting import provenance
from tests import zoo

LINEAR = Type("Linear")


def trained(model: nn.Module) -> nn.Module:
    """The model with adapters that were trained."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    """A stock checkpoint, and what was made of it, each in a folder of its own."""
    root = tmp_path_factory.mktemp("folders")
    model, example = zoo.build("mixtral")
    cast("Any", model).save_pretrained(root / "stock", max_shard_size="40KB")

    def load() -> nn.Module:
        return surgery.load(root / "stock").eval()

    pissa = surgery.apply(load(), Rule(LowRank(method="pissa", rank=2), where=LINEAR, id="a"))
    surgery.save(pissa, root / "pissa")
    lora = trained(surgery.apply(load(), Rule(LowRank(rank=2), where=LINEAR, id="a")))
    fresh = surgery.apply(load(), Rule(LowRank(rank=2), where=LINEAR, id="a"))
    surgery.save(fresh, root / "fresh")
    surgery.export(fresh, root / "fresh-merged", format="merged", example=example)
    surgery.save(lora, root / "lora")
    surgery.save(lora, root / "adapter", adapter_only=True)
    surgery.export(lora, root / "merged", format="merged", example=example)
    adapters.merge(lora)
    surgery.save(lora, root / "merged-saved")
    rewired = surgery.apply(load(), Rule(Shortcuts(topology="ancre"), id="s"), example=example)
    surgery.save(rewired, root / "rewired")
    surgery.save(load().bfloat16(), root / "cast")
    surgery.convert(root / "stock", None, root / "converted", adapter=root / "adapter")
    return root


CASES: dict[str, tuple[str, str, str | None, set[str]]] = {
    # result, source, adapter, the verdicts that are expected
    "changed by a rule": ("pissa", "stock", None, {"equal", "changed", "new", "built"}),
    "adapters beside": ("lora", "stock", None, {"equal", "new", "built"}),
    "adapters alone": ("adapter", "lora", None, {"equal"}),
    "an export, merged": ("merged", "lora", None, {"equal", "merged"}),
    "an export, merged before training": ("fresh-merged", "fresh", None, {"equal"}),
    "merged, the adapter apart": ("merged", "stock", "adapter", {"equal", "merged"}),
    "saved while merged": ("merged-saved", "stock", None, {"equal", "merged", "new", "built"}),
    "rewired": ("rewired", "stock", None, {"equal", "new", "built"}),
    "cast": ("cast", "stock", None, {"cast", "built"}),
    "a conversion": ("converted", "stock", "adapter", {"equal", "merged"}),
    "a saved model and itself": ("pissa", "pissa", None, {"equal", "built"}),
}


@pytest.mark.parametrize("case", CASES)
def test_everything_is_accounted_for(case: str, folders: FilePath) -> None:
    result, source, adapter, verdicts = CASES[case]
    proof = surgery.prove(
        folders / result,
        against=folders / source,
        adapter=None if adapter is None else folders / adapter,
    )
    assert proof.ok, proof.failures
    assert set(proof.counts) == verdicts
    assert proof.files > 0
    proof.check()
    assert "everything is accounted for" in str(proof)


def test_what_the_source_does_not_explain_is_named(folders: FilePath) -> None:
    proof = surgery.prove(folders / "merged", against=folders / "stock")
    assert not proof.ok
    assert {each.verdict for each in proof.failures} == {"unaccounted"}
    assert "model.layers.0.self_attn.q_proj.weight" in {each.name for each in proof.failures}
    with pytest.raises(ContractBroken, match=r"q_proj\.weight: unaccounted: differs from the"):
        proof.check()


def forge(folder: FilePath, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a ``surgery.json`` and make its checksum fit again."""
    path = folder / "surgery.json"
    data = json.loads(path.read_text())
    data.pop("checksum")
    change(data)
    data["checksum"] = provenance.checksum(data)
    path.write_text(json.dumps(data))


def rehash(folder: FilePath, name: str) -> None:
    entry = provenance.file_of(folder / name).model_dump()
    forge(folder, lambda data: data["files"].update({name: entry}))


def alter(folder: FilePath, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a file, and what surgery.json says of it."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    rehash(folder, name)


def _one_bit(folder: FilePath) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].view(torch.int32)[0] ^= 1

    alter(folder, "model.safetensors", flip)


def _a_byte(folder: FilePath) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _an_adapter(folder: FilePath) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1

    alter(folder, "model.safetensors", grow)


def _claimed(folder: FilePath) -> None:
    """A stock tensor that was altered, said to be made by a rule."""
    _one_bit(folder)

    def claim(data: dict[str, Any]) -> None:
        edit = data["record"]["operations"][0]["edits"][0]
        edit["adds"]["model.norm.weight"] = {"shape": [32], "dtype": "float32", "trainable": True}

    forge(folder, claim)


TAMPERED: dict[str, tuple[str, Callable[[FilePath], object], str, str]] = {
    "a byte of a file": ("lora", _a_byte, "wrong file", "other bytes than were written"),
    "a file that is gone": (
        "lora",
        lambda f: (f / "recipe.yaml").unlink(),
        "wrong file",
        "it is missing",
    ),
    "a file that was cut": (
        "lora",
        lambda f: (f / "recipe.yaml").write_text("v"),
        "wrong file",
        "1 bytes",
    ),
    "a file that was added": (
        "lora",
        lambda f: (f / "extra.py").write_text(""),
        "wrong file",
        "does not list it",
    ),
    "one bit of a tensor, hashes forged": ("lora", _one_bit, "unaccounted", "differs from the"),
    "an adapted weight, hashes forged": ("pissa", _an_adapter, "unaccounted", "differs from the"),
    "a stock tensor claimed to be new": ("lora", _claimed, "unaccounted", "of rule 'a', differs"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_tampered_with_is_named(case: str, folders: FilePath, tmp_path: FilePath) -> None:
    source, tamper, verdict, detail = TAMPERED[case]
    folder = shutil.copytree(folders / source, tmp_path / "result")
    tamper(folder)
    proof = surgery.prove(folder, against=folders / "stock")
    found = [each for each in proof.failures if each.verdict == verdict]
    assert found, proof.findings
    assert any(detail in each.detail for each in found), found


def test_a_surgery_json_that_was_changed_is_refused(folders: FilePath, tmp_path: FilePath) -> None:
    folder = shutil.copytree(folders / "merged", tmp_path / "result")
    text = (folder / "surgery.json").read_text()
    (folder / "surgery.json").write_text(text.replace('"merged"', '"mergee"', 1))
    with pytest.raises(ExportError, match="was changed after it was written"):
        surgery.prove(folder, against=folders / "lora")
    with pytest.raises(CheckpointError, match="does not exist"):
        surgery.prove(folder / "nowhere", against=folders / "lora")


def test_a_tensor_that_is_gone_is_lost(folders: FilePath, tmp_path: FilePath) -> None:
    folder = shutil.copytree(folders / "merged", tmp_path / "result")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    alter(folder, "model.safetensors", drop)
    proof = surgery.prove(folder, against=folders / "lora")
    assert [(each.name, each.verdict) for each in proof.failures] == [("model.norm.weight", "lost")]


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_an_adapter_of_peft(method: str, tmp_path: FilePath) -> None:
    model, example = zoo.build("llama")
    rule = Rule(LowRank(method=method, rank=2), where=LINEAR, id="a")
    surgery.save(trained(surgery.apply(model.eval(), rule)), tmp_path / "saved")
    surgery.export(model, tmp_path / "peft", format="peft", example=example)
    proof = surgery.prove(tmp_path / "peft", against=tmp_path / "saved")
    assert proof.ok, proof.failures
    assert set(proof.counts) == {"equal" if method == "lora" else "converted"}

    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    one, other, *_ = [name for name in tensors if name.endswith("q_proj.lora_B.weight")]
    tensors[one][0, -1] += 1
    save_file(tensors, path)
    named = {each.name for each in surgery.prove(path.parent, against=tmp_path / "saved").failures}
    assert one in named
    assert other not in named


def test_stock_weights_that_go_along_with_an_adapter_of_peft(tmp_path: FilePath) -> None:
    model, example = zoo.build("llama")
    rule = Rule(LowRank(rank=2), where=surgery.Role("attention.qkv"), id="a")
    trained(surgery.apply(model.eval(), rule))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lowrank." in name or name == "lm_head.weight")
    surgery.save(model, tmp_path / "saved")
    surgery.export(model, tmp_path / "peft", format="peft", example=example)
    proof = surgery.prove(tmp_path / "peft", against=tmp_path / "saved")
    assert proof.ok, proof.failures
    along = "base_model.model.lm_head.weight"
    assert along in {each.name for each in proof.findings}

    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[along][0, 0] += 1
    save_file(tensors, path)
    failures = surgery.prove(path.parent, against=tmp_path / "saved").failures
    assert along in {each.name for each in failures}


def test_one_file_is_proved_by_the_hashes_beside_it(tmp_path: FilePath) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    surgery.save(model, tmp_path / "stock")
    surgery.apply(model, Rule(LowRank(rank=1), where=LINEAR, id="a"))
    target = tmp_path / "model.pt2"
    surgery.export(model, target, format="torch_export", example=torch.ones(2, 3))
    proof = surgery.prove(target, against=tmp_path / "stock")
    assert proof.ok
    assert proof.counts == {"equal": 4, "new": 4}
    assert "the SHA-256 of the file stands for them" in proof.unchecked[0]
    with torch.no_grad():
        model[0].bias.add_(1)
    surgery.export(model, target, format="torch_export", example=torch.ones(2, 3))
    wrong = surgery.prove(target, against=tmp_path / "stock")
    assert [each.name for each in wrong.failures] == ["0.bias"]
    target.write_bytes(target.read_bytes() + b" ")
    proof = surgery.prove(target, against=tmp_path / "stock")
    assert proof.failures[0].verdict == "wrong file"


def test_no_code_of_the_result_is_run(folders: FilePath, tmp_path: FilePath) -> None:
    folder = shutil.copytree(folders / "merged", tmp_path / "result")
    (folder / "modeling_rewritten.py").write_text("raise SystemExit(3)\n")
    rehash(folder, "modeling_rewritten.py")
    assert surgery.prove(folder, against=folders / "lora").ok
    forge(folder, lambda data: data["source"].update({"class": "os.system"}))
    with pytest.raises(surgery.SourceError, match="refused to resolve"):
        surgery.prove(folder, against=folders / "lora")


def test_the_command(folders: FilePath) -> None:
    runner = CliRunner()
    good = ["verify", str(folders / "lora"), "--against", str(folders / "stock"), "--json"]
    done = runner.invoke(app, good)
    assert done.exit_code == 0
    data = json.loads(done.stdout)
    assert data["ok"] is True
    assert data["counts"]["new"] == sum(f["verdict"] == "new" for f in data["findings"])
    bad = ["verify", str(folders / "merged"), "--against", str(folders / "stock"), "--json"]
    failed = runner.invoke(app, bad)
    assert failed.exit_code == ContractBroken.exit_code
    assert json.loads(failed.stdout.partition("\n}\n")[0] + "\n}")["ok"] is False
    mixed = runner.invoke(app, [*good, "--device", "cpu"])
    assert mixed.exit_code == 2
