"""What a run of ``surgery pretrain`` leaves behind is exported from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import surgery
from surgery import shipped
from surgery.cli import app
from surgery.train.config import PretrainConfig
from surgery.train.run import pretrain
from tests.exporting import models
from tests.train import tiny

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHORT = (
    "train.steps=2",
    "train.batch=4",
    "train.device=cpu",
    "evaluate.samples=8",
    "log.tensorboard=false",
    "schedule.warmup=1",
)
# Shipped configuration → what makes it small, and the format its model is exported to.
RUNS = {
    "dit-tiny-ancre": (models.DIT, "diffusers", ("objective.sample=null",)),
    "resnet-tiny-ancre": ({"in_chans": 1, "widths": [4, 8, 8]}, "python", ()),
    "mlp-64-ancre": ({"depth": 4, "width": 16}, "torch_export", ()),
}


def export(*arguments: str | Path) -> dict:
    done = CliRunner().invoke(app, ["export", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def checked(told: dict, out: Path, form: str) -> None:
    assert (told["format"], told["path"]) == (form, str(out))
    assert told["agreement"]["deviation"] <= told["agreement"]["bound"]
    assert json.loads((out / "surgery.json").read_text())["recipes"][0]["recipe"] == "ancre"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_exported(tmp_path: Path, name: str) -> None:
    small, form, further = RUNS[name]
    changes = [*SHORT, *further]
    changes += [f"model.config.{key}={json.dumps(value)}" for key, value in small.items()]
    config = PretrainConfig.load(shipped.pretraining()[name], changes)
    pretrain(config, out=tmp_path / "run")
    out = tmp_path / "out"
    checked(export(tmp_path / "run" / "model", out, "--format", form), out, form)


def test_a_language_model_is_exported(tmp_path: Path) -> None:
    pretrain(tiny.language(tiny.corpus(tmp_path), "train.steps=2"), out=tmp_path / "run")
    out = tmp_path / "out"
    told = export(tmp_path / "run" / "model", out, "--format", "transformers")
    checked(told, out, "transformers")


def test_the_command_lists_what_fits() -> None:
    arguments = ["--list", "preset:mlp-8", "--json"]
    told = {row["format"]: row["misfit"] for row in export(*arguments[:2])}
    assert told["onnx"] is None
    assert told["python"] is None
    assert told["transformers"] == "it is no model of transformers"


def test_wrong_usage_is_told() -> None:
    done = CliRunner().invoke(app, ["export", "preset:mlp-8"])
    assert done.exit_code == 2
    done = CliRunner().invoke(app, ["export", "preset:mlp-8", "out", "--format", "onxx"])
    assert done.exit_code == surgery.ExportError.exit_code
    assert "did you mean 'onnx'" in done.stderr
