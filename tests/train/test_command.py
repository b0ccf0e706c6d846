"""``surgery pretrain`` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from surgery import shipped
from surgery.cli import app
from surgery.cli.training import configurations
from surgery.terminal import USAGE
from tests.train import tiny


def call(*arguments: str) -> Result:
    environment = {"NO_COLOR": "1", "COLUMNS": "100"}
    return CliRunner().invoke(app, ["pretrain", *arguments], env=environment)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.digits().to_yaml())
    return str(path)


def test_a_run_tells_its_steps_and_its_result(file: str, tmp_path: Path):
    out = str(tmp_path / "run")
    result = call(file, "train.steps=4", "--out", out, "--no-plots", "--json")
    assert result.exit_code == 0, result.stderr
    assert "step 4/4: loss " in result.stderr
    assert "samples/s" in result.stderr
    found = json.loads(result.stdout)
    assert found["steps"] == 4
    assert Path(found["model"], "surgery.json").is_file()
    again = call(file, "train.steps=4", "--out", out)
    assert again.exit_code == 14
    assert "go on with resume (--resume)" in again.stderr
    resumed = call(file, "train.steps=4", "--out", out, "--resume", "--no-plots", "--quiet")
    assert resumed.exit_code == 0, resumed.stderr


def test_what_is_wrong_with_the_configuration_has_its_exit_code(file: str, tmp_path: Path):
    wrong = call(file, "train.stepz=4", "--out", str(tmp_path / "run"))
    assert wrong.exit_code == 12
    assert "did you mean 'steps'?" in wrong.stderr
    assert not (tmp_path / "run").exists()


def test_several_configurations_are_for_comparisons(file: str):
    assert call(file, file).exit_code == USAGE


def test_a_shipped_configuration_is_known_by_its_name(file: str):
    found = configurations(["mlp-64", "train.steps=3", file, "nowhere.yaml"], shipped.pretraining())
    assert found == (
        [shipped.pretraining()["mlp-64"], Path(file), Path("nowhere.yaml")],
        ["train.steps=3"],
    )
