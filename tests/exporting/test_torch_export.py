"""``torch_export``: what is written computes the same at other sizes, with torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import ExportError
from surgery.exporting import fits, outputs, torch_export
from surgery.sources import Example
from tests.exporting import models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_a_decoder_with_shortcuts_takes_other_sizes(tmp_path: Path) -> None:
    model = models.rewired("llama")
    done = surgery.export(model, tmp_path / "m.pt2", format="torch_export", example=models.text())
    assert done.agreement.calls == ("the example", "batch 1", "batch 3", "3 tokens less")
    run = torch.export.load(tmp_path / "m.pt2").module()
    call = models.text(4, 13)
    wanted = outputs(model, Example((), {**call, "use_cache": False}))
    found = run(**call)
    assert set(found) == set(wanted) == {"logits"}
    torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-5)


def test_a_start_that_mixes_nothing_into_the_first_layer(tmp_path: Path) -> None:
    model = models.rewired("llama", init="identity")
    done = surgery.export(
        model, tmp_path / "m.pt2", format="torch_export", example=models.text(), dynamic=[]
    )
    assert done.agreement.deviation < 1e-5


LOADED = """
import sys
sys.modules.update(dict.fromkeys(["surgery", "architectures", "timm", "transformers"]))
import torch
program = torch.export.load(sys.argv[1])
print(float(program.module()(torch.ones(3, 64))["output"].double().sum()))
"""


def test_loading_needs_torch_alone(tmp_path: Path) -> None:
    model = models.rewired("mlp")
    surgery.export(model, tmp_path / "out", format="torch_export")
    file = tmp_path / "out" / "model.pt2"
    command = [sys.executable, "-W", "ignore", "-c", LOADED, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wanted = outputs(model, Example((torch.ones(3, 64),)))["output"].double().sum()
    assert float(done.stdout) == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)


def test_a_file_is_replaced_only_if_an_export_wrote_it(tmp_path: Path) -> None:
    target = tmp_path / "m.pt2"
    target.write_bytes(b"the thesis")
    with pytest.raises(ExportError, match=r"no m\.pt2\.surgery\.json beside it"):
        surgery.export(models.stock("mlp"), target, format="torch_export")
    assert target.read_bytes() == b"the thesis"
    assert [each.name for each in tmp_path.iterdir()] == ["m.pt2"]
    target.unlink()
    surgery.export(models.stock("mlp"), target, format="torch_export")
    first = target.read_bytes()
    surgery.export(models.rewired("mlp"), target, format="torch_export")
    assert target.read_bytes() != first


@pytest.mark.parametrize("merged", [False, True])
def test_adapters(tmp_path: Path, merged: bool) -> None:
    model = models.adapted(models.stock("mlp"))
    if merged:
        surgery.adapters.merge(model)
    done = surgery.export(model, tmp_path / "m.pt2", format="torch_export")
    assert done.agreement.ok
    x = torch.ones(3, 64)
    found = torch.export.load(tmp_path / "m.pt2").module()(x)["output"]
    stock = outputs(models.stock("mlp"), Example((x,)))["output"]
    assert not torch.allclose(found, stock, atol=1e-3)


def test_images_may_vary_in_size(tmp_path: Path) -> None:
    model = models.rewired("resnet")
    done = surgery.export(
        model, tmp_path / "m.pt2", format="torch_export", dynamic=["batch", "image"]
    )
    assert "images twice as high" in done.agreement.calls


def test_what_cannot_vary_is_told(tmp_path: Path) -> None:
    with pytest.raises(surgery.ExportError, match=r"no image|cannot trace|could not trace"):
        surgery.export(
            models.stock("mlp"), tmp_path / "m.pt2", format="torch_export", dynamic=["image"]
        )
    with pytest.raises(surgery.ExportError, match="dynamic"):
        surgery.export(
            models.stock("mlp"), tmp_path / "m.pt2", format="torch_export", dynamic=["height"]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_a_compiler_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_export, "missing_compiler", lambda: "no compiler")
    with pytest.raises(surgery.ExportError, match="no compiler"):
        surgery.export(models.stock("mlp"), tmp_path / "m.pt2", format="torch_export", aot=True)


@pytest.mark.skipif(torch_export.missing_compiler() is not None, reason="no C++ compiler")
def test_a_compiled_package(tmp_path: Path) -> None:
    model = models.rewired("mlp")
    done = surgery.export(model, tmp_path / "m.pt2", format="torch_export", aot=True)
    assert done.agreement.consumer.startswith("AOTInductor")
    assert done.agreement.ok


def test_every_model_may_fit() -> None:
    found = {fit.format: fit.misfit for fit in fits(torch.nn.Linear(2, 2))}
    assert found["torch_export"] is None
    assert found["transformers"] == "it is no model of transformers"
