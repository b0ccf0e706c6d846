"""Stock checkpoints into rewritten models and back; models that got their weights on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import surgery
from surgery import Freeze, LowRank, Rule, Shortcuts, Type, adapters
from surgery.checkpoints.inventory import places
from surgery.cli import app
from surgery.errors import CheckpointError, ModelStateError, SurgeryError
from surgery.passes.lowrank import LowRank as Pass
from surgery.record import Edit, record_of
from surgery.sources import describe, rebuild
from tests import zoo

ANCRE = Rule(Shortcuts(topology="ancre", init="identity"), id="shortcuts")


def linear(method: str = "lora", **options: Any) -> Rule:
    return Rule(LowRank(method=method, rank=2, **options), where=Type("Linear"), id="adapters")


def other_weights(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same model with other weights, and those."""
    model = zoo.perturb(zoo.build(name)[0], seed=3)
    return model, {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    return {name: place.tensor.detach() for name, place in places(model)}


def outputs(model: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        return next(iter(model(*example.args, **example.kwargs).values()))


# -- load_weights, stock_weights -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_stock_state_dict_goes_in_and_comes_out(name: str, method: str) -> None:
    model, example = zoo.build(name)
    surgery.apply(model, Rule(LowRank(method=method, rank=2)), example=example)
    objects = {key: id(place.tensor) for key, place in places(model)}
    other, weights = other_weights(name)
    assert surgery.load_weights(model, weights) is model
    assert {key: id(place.tensor) for key, place in places(model)} == objects
    found, expected = outputs(model, example), outputs(other, example)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)  # W - s B A + s B A, in float32
    assert same(surgery.stock_weights(model), weights)
    other.load_state_dict(surgery.stock_weights(model), strict=True)
    surgery.undo(model)
    assert same(model.state_dict(), weights)


def test_a_folder_goes_in_and_its_layout_comes_out(tmp_path: FilePath) -> None:
    other, weights = other_weights("mixtral")
    cast("Any", other).save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 1
    model, example = zoo.build("mixtral")
    surgery.apply(model, [ANCRE, linear()], example=example)
    surgery.load_weights(model, tmp_path / "stock")
    assert torch.equal(outputs(model, example), outputs(other, example))
    (tmp_path / "again").mkdir()
    published = surgery.stock_weights(model, published=True)
    save_file({k: t.contiguous() for k, t in published.items()}, tmp_path / "again/m.safetensors")
    fresh, _ = zoo.build("mixtral")
    surgery.load_weights(fresh, tmp_path / "again")
    assert same(fresh.state_dict(), weights)


def test_values_are_cast_to_the_dtype_of_the_model() -> None:
    model, _ = zoo.build("llama")
    _, weights = other_weights("llama")
    surgery.load_weights(model.bfloat16(), weights)
    assert same(model.state_dict(), {name: each.bfloat16() for name, each in weights.items()})


def _refused(spoil: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, example = zoo.build("gpt2")
    surgery.apply(model, linear(), example=example)
    _, weights = other_weights("gpt2")
    match spoil:
        case "missing":
            weights.pop("transformer.ln_f.bias")
        case "unexpected":
            weights["odd"] = torch.zeros(1)
        case "merged":
            adapters.merge(model)
        case "untied":
            weights["lm_head.weight"] = weights["lm_head.weight"] + 1
        case "integers":
            weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"].to(torch.int8)
        case _:
            model.to("meta")
    return model, weights


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        ("missing", CheckpointError, r"needs transformer\.ln_f\.bias, which is not there"),
        ("unexpected", CheckpointError, "has no place for odd"),
        ("merged", ModelStateError, "is in the present weight itself"),
        ("untied", CheckpointError, "values for lm_head.weight and transformer.wte.weight, which"),
        ("integers", CheckpointError, r"ln_f\.bias is torch\.int8 in the checkpoint"),
        ("meta", ModelStateError, "is on the meta device"),
    ],
)
def test_what_cannot_be_loaded(spoil: str, error: type[SurgeryError], message: str) -> None:
    model, weights = _refused(spoil)
    with pytest.raises(error, match=message):
        surgery.load_weights(model, weights)


def test_what_is_allowed_to_be_missing_stays() -> None:
    model, example = zoo.build("gpt2")
    surgery.apply(model, Rule(LowRank(rank=2), where=Type("Conv1D")), example=example)
    _, weights = other_weights("gpt2")
    before = cast("Any", model).transformer.ln_f.bias.clone()
    del weights["transformer.ln_f.bias"]
    surgery.load_weights(
        model, {**weights, "odd": before}, allow_missing=True, allow_unexpected=True
    )
    assert torch.equal(cast("Any", model).transformer.ln_f.bias, before)
    adapted = "transformer.h.0.attn.c_attn.weight"
    del weights[adapted]
    with pytest.raises(CheckpointError, match=f"lacks {adapted}, beside which rule"):
        surgery.load_weights(model, weights, allow_missing=True)


# -- materialize -----------------------------------------------------------------------------------

METHODS = ["lora", "pissa", "dora", "olora"]
FAMILIES = ["llama", "gpt2", "mixtral", "whisper", "timm_swin", "DiTTransformer2DModel"]


def on_meta(model: nn.Module) -> nn.Module:
    """The same model as ``surgery.load(..., device="meta")`` builds it."""
    description = describe(model)
    assert description is not None
    return rebuild(description, device="meta").eval()


def cases() -> Iterator[tuple[str, str]]:
    yield from ((name, "lora") for name in FAMILIES)
    yield from (("llama", method) for method in METHODS[1:])


@pytest.mark.parametrize(("name", "method"), list(cases()))
def test_what_was_rewritten_on_meta_is_what_applying_gives(name: str, method: str) -> None:
    real, example = zoo.build(name)
    meta = on_meta(real)
    weights = {key: value.clone() for key, value in real.state_dict().items()}
    rules = [linear(method)] if name in ("timm_swin", "whisper") else [ANCRE, linear(method)]
    surgery.apply(meta, rules, example=example.to("meta"))
    flags = [parameter.requires_grad for parameter in meta.parameters()]
    assert surgery.materialize(meta, weights) is meta
    surgery.apply(real, rules, example=example)
    assert same(every_tensor(meta), every_tensor(real))
    assert [parameter.requires_grad for parameter in meta.parameters()] == flags
    ours, theirs = record_of(meta), record_of(real)
    assert ours is not None
    assert theirs is not None
    assert [edit.adds for edit in ours.edits] == [edit.adds for edit in theirs.edits]
    surgery.undo(meta)
    assert same(meta.state_dict(), weights)


def test_a_folder_is_streamed_with_one_tensor_at_a_time(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, example = zoo.build("mixtral")
    cast("Any", real).save_pretrained(tmp_path, max_shard_size="20KB")
    meta = surgery.load(tmp_path, device="meta").eval()
    surgery.apply(meta, [ANCRE, linear()], example=example)
    surgery.apply(meta, Rule(Freeze(), id="constants"), example=example)
    alive: list[int] = []
    read = surgery.checkpoints.sharded.Checkpoint.read  # type: ignore[attr-defined]

    def counted(self: Any, name: str) -> Tensor:
        alive.append(1)
        return read(self, name)

    monkeypatch.setattr("surgery.checkpoints.sharded.Checkpoint.read", counted)
    surgery.materialize(meta, tmp_path)
    names = surgery.keymap(real)
    assert len(alive) == len(names.by_key)
    assert torch.equal(outputs(meta, example), outputs(real, example))
    assert same(surgery.stock_weights(meta), real.state_dict())


def test_nothing_stays_on_meta_in_silence() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("table", torch.ones(4), persistent=False)

    model = Own()
    weights = model.state_dict()
    model.to("meta")
    before = every_tensor(model)
    with pytest.raises(ModelStateError, match="table is on the meta device and no checkpoint"):
        surgery.materialize(model, weights)
    assert all(
        place.tensor is before[name] or place.tensor.is_meta for name, place in places(model)
    )
    model.table = torch.full((4,), 2.0)
    surgery.materialize(model, weights)
    assert same(model.state_dict(), weights)
    assert torch.equal(model.table, torch.full((4,), 2.0))


def test_a_failure_leaves_the_model_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    real, example = zoo.build("llama")
    meta = on_meta(real)
    surgery.apply(meta, linear(), example=example.to("meta"))
    incomplete = {k: v for k, v in real.state_dict().items() if k != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"needs model\.norm\.weight"):
        surgery.materialize(meta, incomplete)

    def fail(self: Pass, model: nn.Module, edit: Edit, context: object) -> Edit:
        raise ModelStateError("no values")

    with monkeypatch.context() as patched:
        patched.setattr(Pass, "begin", fail)
        with pytest.raises(ModelStateError, match="no values"):
            surgery.materialize(meta, real.state_dict())
    assert all(place.tensor.is_meta for _, place in places(meta))
    surgery.materialize(meta, real.state_dict())
    with pytest.raises(ModelStateError, match="no tensor of the model is on the meta device"):
        surgery.materialize(meta, real.state_dict())


def test_the_command_streams_into_what_it_would_have_loaded(tmp_path: FilePath) -> None:
    stock = zoo.build("mixtral")[0].bfloat16()
    cast("Any", stock).save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "version: 1\nrecipe: both\nrules:\n"
        "  - {pass: shortcuts, with: {topology: ancre, init: identity}}\n"
        "  - {pass: lowrank, where: {type: Linear}, with: {method: pissa, rank: 2}}\n"
    )
    runner = CliRunner()
    files: list[dict[str, str]] = []
    for name, more in (("loaded", []), ("streamed", ["--materialize", str(tmp_path / "stock")])):
        out = tmp_path / name
        arguments = ["apply", str(tmp_path / "stock"), str(rules), "--out", str(out), *more]
        done = runner.invoke(app, arguments)
        assert done.exit_code == 0, done.stderr
        entries = json.loads((out / "surgery.json").read_text())["files"]
        files.append({file: entry["sha256"] for file, entry in entries.items()})
    assert files[0] == files[1]
    assert "model.safetensors" in files[0]
