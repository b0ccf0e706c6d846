"""What cannot be converted is refused with the reason, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import surgery
from surgery import LowRank, Recipe, Rule
from surgery import Path as At
from surgery.checkpoints.swap import unfinished
from surgery.cli import app
from surgery.errors import CheckpointError, SurgeryError
from tests.zoo import build

QKV = At("model.layers.*.self_attn.*_proj")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build("llama")[0].save_pretrained(tmp_path / "source")  # type: ignore[operator]
    return tmp_path / "source"


def changed(source: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Write the weights again, changed."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def configured(source: Path, **fields: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def adapter_of(source: Path, folder: Path) -> Path:
    model = surgery.apply(surgery.load(source), Rule(LowRank(rank=2), where=QKV))
    surgery.save(model, folder, adapter_only=True)
    return folder


def refused(match: str, source: Path, rules: Rule | None, out: Path, **options: object) -> None:
    with pytest.raises(SurgeryError, match=match):
        surgery.convert(source, rules, out, **options)  # type: ignore[arg-type]
    assert not out.exists()
    assert not unfinished(out).exists()


@pytest.mark.parametrize("rules", [None, Rule(LowRank(rank=2), where=QKV)])
def test_keys_that_do_not_fit(rules: Rule | None, source: Path, tmp_path: Path) -> None:
    changed(source, lambda tensors: tensors.update(foreign=torch.zeros(2)))
    refused("no place for foreign", source, rules, tmp_path / "out", dtype="float16")
    changed(source, lambda tensors: [tensors.pop(name) for name in ("foreign", f"{Q}.weight")])
    refused(f"needs {Q}.weight", source, rules, tmp_path / "out", dtype="float16")


def test_shape_that_does_not_fit(source: Path, tmp_path: Path) -> None:
    changed(source, lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(3, 3)}))
    refused(f"{Q}.weight", source, None, tmp_path / "out", dtype="float16")


def test_integers_for_a_weight(source: Path, tmp_path: Path) -> None:
    def rounded(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.int8)

    changed(source, rounded)
    refused("int8", source, None, tmp_path / "out", dtype="float16")


def tied(source: Path, *, same: bool) -> None:
    """A checkpoint that holds both names of a tied weight."""
    configured(source, tie_word_embeddings=True)

    def both(tensors: dict[str, Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if same else embedding + 1

    changed(source, both)


def test_tied_weights_that_differ(source: Path, tmp_path: Path) -> None:
    tied(source, same=False)
    refused("different values for", source, None, tmp_path / "out", dtype="float16")


def test_tied_weights_that_are_the_same(source: Path, tmp_path: Path) -> None:
    tied(source, same=True)
    rule = Rule(LowRank(method="pissa", rank=2), where=At("model.embed_tokens"))
    surgery.save(surgery.apply(surgery.load(source), rule), tmp_path / "wanted")
    surgery.convert(source, rule, tmp_path / "out")
    for name in ("model.safetensors", "kept.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    assert surgery.restore(tmp_path / "out").get_parameter("lm_head.weight") is not None


def quantise(source: Path) -> dict[str, Tensor]:
    """One layer in fp8 with block scales, another in GPTQ; the tensors as they are stored."""
    configured(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})

    def packed(tensors: dict[str, Tensor]) -> None:
        up = "model.layers.0.mlp.up_proj"
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{Q}.weight_scale_inv"] = torch.ones(1, 1)
        weight = tensors.pop(f"{up}.weight")
        tensors[f"{up}.qweight"] = torch.ones(weight.shape[0] // 8, 4, dtype=torch.int32)
        tensors[f"{up}.qzeros"] = torch.ones(1, 4, dtype=torch.int32)
        tensors[f"{up}.scales"] = torch.ones(1, 4, dtype=torch.float16)
        tensors[f"{up}.g_idx"] = torch.zeros(4, dtype=torch.int32)

    changed(source, packed)
    return load_file(source / "model.safetensors")


def test_quantised_modules_are_copied(source: Path, tmp_path: Path) -> None:
    adapter = adapter_of(source, tmp_path / "adapter")
    stored = quantise(source)
    surgery.convert(source, None, tmp_path / "out", dtype="bfloat16", max_shard_size="1GB")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == stored.keys()
    kept = [name for name, tensor in found.items() if tensor.dtype != torch.bfloat16]
    assert sorted(kept) == sorted(
        name for name in stored if name.startswith(Q) or "layers.0.mlp.up_proj" in name
    )
    for name in kept:
        assert torch.equal(found[name].view(torch.uint8), stored[name].view(torch.uint8))
    out = tmp_path / "merged"
    refused(f"{Q}.weight is quantised", source, None, out, adapter=adapter, allow_other_base=True)
    refused("is quantised", source, Rule(LowRank(rank=2), where=QKV), tmp_path / "ruled")


def test_missing_weight_beside_a_quantised_module(source: Path, tmp_path: Path) -> None:
    quantise(source)
    changed(source, lambda tensors: tensors.pop("model.norm.weight"))
    refused("needs model.norm.weight", source, None, tmp_path / "out", dtype="bfloat16")


def test_adapter_of_other_weights(source: Path, tmp_path: Path) -> None:
    adapter = adapter_of(source, tmp_path / "adapter")
    changed(source, lambda tensors: tensors["model.norm.weight"].add_(1))
    refused("saved beside other values", source, None, tmp_path / "out", adapter=adapter)
    surgery.convert(source, None, tmp_path / "out", adapter=adapter, allow_other_base=True)


def test_adapter_with_other_edits(source: Path, tmp_path: Path) -> None:
    model = surgery.apply(surgery.load(source), Rule(surgery.Shortcuts(init="identity")))
    surgery.save(model, tmp_path / "adapter", adapter_only=True)
    refused("no stock weight", source, None, tmp_path / "out", adapter=tmp_path / "adapter")


def test_whole_model_as_adapter(source: Path, tmp_path: Path) -> None:
    surgery.save(surgery.load(source), tmp_path / "whole")
    refused("whole model", source, None, tmp_path / "out", adapter=tmp_path / "whole")


def test_places_and_options(source: Path, tmp_path: Path) -> None:
    for out in (source, source / "inside", tmp_path):
        with pytest.raises(CheckpointError, match="lie in one another"):
            surgery.convert(source, None, out, dtype="float16")
    refused("nothing to convert", source, None, tmp_path / "out")
    refused("threads is 0", source, None, tmp_path / "out", dtype="float16", threads=0)
    refused("max_shard_size", source, None, tmp_path / "out", max_shard_size="many")
    refused("expected a floating dtype", source, None, tmp_path / "out", dtype="int8")
    refused("no folder", tmp_path / "nowhere", None, tmp_path / "out", dtype="float16")
    (source / "config.json").unlink()
    refused(r"no config\.json", source, None, tmp_path / "out", dtype="float16")


def test_link_out_of_the_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (source / "extra.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="outside of its folder"):
        surgery.convert(source, None, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(source: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app, ["convert", str(source), "none", str(tmp_path / "a"), "--dtype", "float16", "--json"]
    )
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)["kind"] == "stock model"
    rules = tmp_path / "rules.yaml"
    recipe = Recipe(rules=[Rule(LowRank(rank=2), where=QKV)], recipe="adapters")
    rules.write_text(recipe.to_yaml())
    run = CliRunner().invoke(app, ["convert", str(tmp_path / "a"), str(rules), str(tmp_path / "b")])
    assert run.exit_code == 0, run.stderr
    assert surgery.adapters.names(surgery.restore(tmp_path / "b")) == ("default",)
    run = CliRunner().invoke(app, ["convert", str(source), "none", str(tmp_path / "c")])
    assert run.exit_code == CheckpointError.exit_code
