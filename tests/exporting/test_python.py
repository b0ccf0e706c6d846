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
from surgery.sources import Example
from tests.exporting import models

# Name → the model, its options, and a call of another size than the one the export checks.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "replaced": ("resnet", {"mode": "replace", "normalization": "outgoing"}, (3, 1, 48, 32)),
    "denseformer": ("mlp", {"topology": "denseformer"}, (3, 64)),
    "static": ("mlp", {"topology": "static", "edges": "0:2, 1:4=0.5"}, (3, 64)),
    "identity": ("mlp", {"init": "identity"}, (3, 64)),
}


def loaded(folder: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location(
        f"exported_{folder.parent.name}", folder / "model.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.load()


@pytest.mark.parametrize("case", CASES)
def test_rewired(tmp_path: Path, case: str) -> None:
    name, given, shape = CASES[case]
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


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_written_when_merged(tmp_path: Path, merged: bool) -> None:
    model = models.adapted(models.stock("mlp"))
    if not merged:
        with pytest.raises(surgery.ExportError, match=r"merge its adapters"):
            surgery.export(model, tmp_path / "out", format="python")
        return
    surgery.adapters.merge(model)
    done = surgery.export(model, tmp_path / "out", format="python")
    text = (tmp_path / "out" / "model.py").read_text()
    assert done.agreement.ok
    assert packages(text) == {"torch", "safetensors"}
    assert "rewrite" not in text


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
