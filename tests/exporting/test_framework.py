"""What every export has in common: the target, the refusals, the provenance, the listing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery import exporting
from surgery.exporting import Agreement, Format, agreement, outputs, provenance
from surgery.registry import FORMATS
from surgery.rules.strict import options
from surgery.sources import Example


class Line(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.linear(x))


@options
class Plain(Format):
    """Weights of a ``Line``, for these tests."""

    name: ClassVar[str] = "plain"
    file: ClassVar[str | None] = "line.safetensors"

    scale: float = 1.0
    notes: bool = False

    def misfit(self, model: nn.Module) -> str | None:
        return None if isinstance(model, Line) else "it is no Line"

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        tensors = {name: self.scale * t.detach() for name, t in model.state_dict().items()}
        save_file(tensors, work / "line.safetensors")
        if self.notes:
            (work / "notes.txt").write_text("beside")

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        loaded = Line().eval()
        loaded.load_state_dict(load_file(written / "line.safetensors"))
        return agreement(
            "a Line", [("as given", outputs(model, example), outputs(loaded, example))]
        )


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS._loaded, "plain", Plain)
    monkeypatch.setitem(FORMATS._builtin, "plain", f"{__name__}:Plain")


X = torch.linspace(-1, 1, 6).reshape(2, 3)


def export(out: Path, model: nn.Module | None = None, **given: Any) -> exporting.Exported:
    return surgery.export(
        Line() if model is None else model, out, **{"format": "plain", "example": X} | given
    )


def test_a_folder_gets_files_and_provenance(tmp_path: Path) -> None:
    done = export(tmp_path / "out")
    assert done.agreement.ok
    assert done.agreement.deviation == 0.0
    assert set(done.files) == {"line.safetensors"}
    told = provenance.read(tmp_path / "out")
    assert told.export == "plain"
    assert told.options == {"scale": 1.0, "notes": False}
    assert told.files["line.safetensors"].bytes == done.files["line.safetensors"]
    assert set(told.tensors) == {"linear.weight", "linear.bias"}
    assert told.versions["torch"] == str(torch.__version__)
    assert str(tmp_path / "out") in str(done)


def test_a_file_is_the_export_with_its_provenance_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    both = {"model.safetensors", "model.safetensors.surgery.json"}
    for _ in range(2):
        done = export(target)
    assert {each.name for each in tmp_path.iterdir()} == both
    told = provenance.read(target)
    assert told.files == {"model.safetensors": provenance.file_of(target)}
    assert set(done.files) == {"model.safetensors"}
    with pytest.raises(surgery.ExportError, match="more than one file"):
        export(target, notes=True)
    assert {each.name for each in tmp_path.iterdir()} == both


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = Line().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    export(tmp_path / "out", model)
    assert model.training
    assert model.drop.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_an_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(folder)
    export(folder, scale=1.0)
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(surgery.ExportError, match=r"mine\.txt besides an export"):
        export(folder)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep")
    with pytest.raises(surgery.ExportError, match="no export"):
        export(foreign)
    assert (foreign / "mine.txt").read_text() == "keep"
    assert (folder / "mine.txt").read_text() == "keep"


def test_what_computes_something_else_is_not_written(tmp_path: Path) -> None:
    for target in (tmp_path / "out", tmp_path / "out.safetensors"):
        with pytest.raises(surgery.ExportError, match="computes something else"):
            export(target, scale=1.01)
    assert list(tmp_path.iterdir()) == []


def nan() -> nn.Module:
    model = Line()
    nn.init.constant_(model.linear.bias, torch.nan)
    return model


REFUSED = [
    (nan, {}, "returns NaN"),
    (lambda: Line().to("meta"), {}, "meta device"),
    (lambda: nn.Linear(3, 2), {}, "does not fit the format 'plain': it is no Line"),
    (Line, {"example": None}, "an example call is needed"),
    (Line, {"format": "plein"}, "did you mean 'plain'"),
    (Line, {"scale": "one"}, "scale"),
    (Line, {"scales": 1.0}, "did you mean 'scale'"),
]


@pytest.mark.parametrize(("build", "given", "message"), REFUSED)
def test_refusals(tmp_path: Path, build: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(surgery.ExportError, match=message):
        export(tmp_path / "out", build(), **given)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_provenance_is_noticed(tmp_path: Path) -> None:
    export(tmp_path)
    path = tmp_path / "surgery.json"
    data = json.loads(path.read_text())
    data["export"] = "other"
    path.write_text(json.dumps(data))
    with pytest.raises(surgery.ExportError, match="checksum"):
        provenance.read(tmp_path)


def test_agreement_tells_where_it_is_worst() -> None:
    one, other = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2)}
    found = agreement("x", [("call", one, {**other, "b": torch.tensor([1.0, 1.0, 1.5])})])
    assert (found.deviation, found.where, found.ok) == (0.5, "b (call)", False)
    assert not agreement("x", [("call", one, other)]).ok
    assert not agreement("x", [("call", other, one)]).ok
    assert not agreement("x", [("call", other, {"a": torch.tensor([1.0, torch.nan])})]).ok
    same = {"a": torch.tensor([1.0, -torch.inf])}
    assert agreement("x", [("call", same, same)]).deviation == 0.0
    with pytest.raises(surgery.ExportError, match="no floating tensor"):
        agreement("x", [("call", {}, {})])


def test_fits_gives_reasons() -> None:
    found = {fit.format: fit.misfit for fit in exporting.fits(nn.Linear(2, 2))}
    assert found["plain"] == "it is no Line"
    assert {fit.format: fit.misfit for fit in exporting.fits(Line())}["plain"] is None
