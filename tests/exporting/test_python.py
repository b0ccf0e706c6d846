"""``python``: one file and the weights, loaded where this library cannot be imported."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.exporting import outputs
from surgery.sources import Example, infer_example
from tests.exporting import models, own
from tests.exporting.together import Together

# Name → the model, its options, and a call of another size than the one the export checks.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "replaced": ("resnet", {"mode": "replace", "normalization": "outgoing"}, (3, 1, 48, 32)),
    "denseformer": ("mlp", {"topology": "denseformer"}, (3, 64)),
    "static": ("mlp", {"topology": "static", "edges": "0:2, 1:4=0.5"}, (3, 64)),
    "identity": ("mlp", {"init": "identity"}, (3, 64)),
}


def loaded(folder: Path) -> nn.Module:
    name = f"exported_{folder.parent.name}"
    spec = importlib.util.spec_from_file_location(name, folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.load()


@pytest.mark.parametrize("case", CASES)
def test_rewired(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, given, shape = CASES[case]
    Together(tmp_path, monkeypatch)  # compared below, in this process
    model = models.rewired(name, **given)
    surgery.export(model, tmp_path / "out", format="python")
    call = Example((torch.randn(shape),))
    found, wanted = outputs(loaded(tmp_path / "out"), call), outputs(model, call)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    stock = outputs(models.stock(name), call)
    assert not torch.allclose(stock["output"], wanted["output"], atol=1e-3)


def test_frozen_shortcuts(tmp_path: Path) -> None:
    model = models.rewired("mlp")
    surgery.apply(model, surgery.Rule(surgery.Freeze(threshold=0.1), where=surgery.Stack("all")))
    done = surgery.export(model, tmp_path / "out", format="python")
    assert done.agreement.ok
    assert "frozen=Fixed(" in (tmp_path / "out" / "model.py").read_text()


def test_a_model_of_timm(tmp_path: Path) -> None:
    model = models.rewired("vit")
    done = surgery.export(model, tmp_path / "out", format="python")
    assert done.agreement.deviation < 1e-5
    assert set(done.files) == {"model.py", "model.safetensors"}
    text = (tmp_path / "out" / "model.py").read_text()
    assert "steps = begin(self.blocks)" in text
    assert packages(text) <= {"torch", "timm", "safetensors"}


def packages(text: str) -> set[str]:
    """Top names of what a file imports, Python's own left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_merged_adapters_leave_no_trace(tmp_path: Path) -> None:
    model = models.adapted(models.stock("mlp"))
    surgery.adapters.merge(model)
    done = surgery.export(model, tmp_path / "out", format="python")
    text = (tmp_path / "out" / "model.py").read_text()
    assert done.agreement.ok
    assert packages(text) == {"torch", "safetensors"}
    assert "rewrite" not in text


def agrees(folder: Path, model: nn.Module, call: Example) -> nn.Module:
    again = loaded(folder)
    torch.testing.assert_close(outputs(again, call), outputs(model, call), rtol=1e-4, atol=1e-5)
    return again


X = Example((torch.linspace(-1, 1, 192).reshape(3, 64),))
METHODS = ("dora", "pissa", "sorsa", "nora", "scalora", "reflora")


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_every_kind(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Together(tmp_path, monkeypatch)  # compared below, in this process
    model = models.adapted(models.rewired("mlp"), method=method, alpha=3.0)
    surgery.export(model, tmp_path / "out", format="python")
    again = agrees(tmp_path / "out", model, X)
    trained = {name for name, each in again.named_parameters() if each.requires_grad}
    assert trained == {name for name, each in model.named_parameters() if each.requires_grad}
    again.train()(*X.args).square().sum().backward()
    assert all(again.get_parameter(name).grad is not None for name in trained)


def test_several_adapters_keep_their_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Together(tmp_path, monkeypatch)
    model = models.adapted(models.stock("mlp"), method="pissa", adapter="one", freeze="none")
    models.adapted(model, adapter="two", freeze="none", dropout=0.5)
    surgery.adapters.activate(model, {"one": 0.5, "two": 2.0})
    surgery.export(model, tmp_path / "out", format="python")
    again = agrees(tmp_path / "out", model, X)
    assert all(each.requires_grad for each in again.parameters())
    surgery.adapters.activate(model, {"two": 1.0})
    for module in again.modules():
        if type(module).__name__ == "Bank":
            module.active = (("two", 1.0),)
    torch.testing.assert_close(outputs(again, X), outputs(model, X), rtol=1e-4, atol=1e-5)


def test_convolutions_embeddings_slices_and_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Together(tmp_path, monkeypatch)
    cases = {
        "resnet": (models.stock("resnet"), surgery.Rule(surgery.LowRank(rank=2)), "image"),
        "vit": (
            models.rewired("vit"),
            surgery.Rule(
                surgery.LowRank(rank=2, slices=("q", "v")), where=surgery.Role("attention.qkv")
            ),
            "image",
        ),
        "tower": (own.Tower(8), surgery.Rule(surgery.LowRank(rank=2)), "ids"),
    }
    calls = {"image": None, "ids": Example((models.ids(2, 5) % 11,))}
    for name, (model, rule, kind) in cases.items():
        models.stirred(surgery.apply(model.eval(), rule))
        arguments = {"arguments": {"width": 8}} if name == "tower" else {}
        folder = tmp_path / name / "out"
        surgery.export(model, folder, format="python", example=calls[kind], **arguments)
        call = calls[kind] or infer_example(model)
        again = agrees(folder, model, call)
        names = {key for key, _ in again.named_parameters()}
        assert names == {key for key, _ in model.named_parameters()}


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    model = models.rewire(own.Tower(8, depth=4).eval(), example=torch.zeros(2, 5).long())
    given = {"format": "python", "example": models.ids(2, 5) % 11}
    done = surgery.export(
        model, tmp_path / "out", arguments={"width": 8, "depth": 4}, max_shard_size=600, **given
    )
    assert done.agreement.deviation < 1e-5
    assert "model.safetensors.index.json" in done.files
    assert sum(name.startswith("model-0000") for name in done.files) > 2
    text = (tmp_path / "out" / "model.py").read_text()
    assert "model = Tower(width=8, depth=4)" in text
    assert packages(text) == {"torch", "safetensors"}
    surgery.export(own.Fixed().eval(), tmp_path / "fixed", **given)


OWN_MISFITS = [
    ({}, r"how it is made is not known \(missing a required argument: 'width'\)"),
    ({"arguments": {"width": 8, "deep": 1}}, "unexpected keyword argument 'deep'"),
    ({"arguments": {"width": 9}}, r"makes another model: its embed.weight is \(11, 9\)"),
    ({"arguments": {"width": "8"}}, "makes no model: TypeError"),
    ({"arguments": {"width": 8}, "max_shard_size": "big"}, "max_shard_size is 'big'"),
]


@pytest.mark.parametrize(("given", "message"), OWN_MISFITS)
def test_misfits_of_ones_own(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(surgery.ExportError, match=message):
        surgery.export(
            own.Tower(8), tmp_path / "out", format="python", example=models.ids() % 11, **given
        )
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_text_of_its_own(tmp_path: Path) -> None:
    class Inner(own.Fixed):
        pass

    with pytest.raises(surgery.ExportError, match="defined within something else"):
        surgery.export(Inner(), tmp_path / "out", format="python", example=models.ids() % 11)


MISFITS = [
    (lambda: models.stock("llama"), "format 'transformers' is meant"),
    (lambda: models.rewired("mlp", scope="residual"), "captured graph"),
    (lambda: torch.nn.Linear(2, 2), "class of the user's own"),
]


@pytest.mark.parametrize(("build", "message"), MISFITS)
def test_misfits(tmp_path: Path, build: Any, message: str) -> None:
    with pytest.raises(surgery.ExportError, match=message):
        surgery.export(build(), tmp_path / "out", format="python", example=torch.ones(2, 64))
    assert list(tmp_path.iterdir()) == []
