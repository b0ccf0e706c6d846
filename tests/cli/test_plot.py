"""`surgery plot`, and `surgery pretrain --compare` without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from surgery.cli import app
from surgery.errors import ConfigError, TrainingError
from surgery.terminal import USAGE
from surgery.train.compare import Comparison, Row, Spread
from tests.train.views.folders import make_run


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), env={"NO_COLOR": "1", "COLUMNS": "80"})


def test_plot_writes_pictures_and_says_what_was_saved(tmp_path: Path) -> None:
    runs = [
        str(make_run(tmp_path / name, {}, name=name, floor=floor, rules=None))
        for name, floor in (("base", 1.5), ("better", 1.2))
    ]

    result = call("plot", *runs, "--out", str(tmp_path / "out"), "--format", "svg")

    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "losses.svg").is_file()
    assert "fewer steps" in result.stdout
    assert "no rules" in result.stderr


def test_plot_as_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})

    result = call("plot", str(run), "--json")

    assert json.loads(result.stdout)["files"] == [str(run / "plots" / "losses.png")]


def test_a_missing_run_ends_with_the_code_of_its_error(tmp_path: Path) -> None:
    result = call("plot", str(tmp_path / "nothing"))

    assert result.exit_code == TrainingError.exit_code
    assert "there is no run" in result.stderr
    assert result.stdout == ""


CONFIG = """\
name: {name}
model: {{source: "preset:llama-tiny"}}
data: {{kind: text, length: 16}}
objective: {{kind: language}}
optim: {{name: adamw, lr: 1.0e-3}}
train: {{steps: {steps}, batch: 4}}
"""


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    paths: list[str] = []
    for name, steps in (("a", 10), ("b", 20)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(CONFIG.format(name=name, steps=steps))
        paths.append(str(path))
    return paths


def test_compare_hands_configurations_seeds_and_budget_on(
    configs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def compare(found: Any, seeds: Any, out: Path, **options: Any) -> Comparison:
        seen.update(names=[c.name for c in found], seeds=seeds, out=out, **options)
        seen["lr"] = [c.optim.lr for c in found]
        row = Row("a", {"loss": Spread({0: 1.5})}, (), None, None, None, None, None, None)
        return Comparison(10, (0,), (row,), (), out)

    monkeypatch.setattr("surgery.train.compare.compare", compare)
    out = str(tmp_path / "out")
    given = ["--seeds", "0,2", "--budget", "10", "--out", out]

    result = call("pretrain", "--compare", *configs, "optim.lr=0.5", *given)

    assert result.exit_code == 0, result.stderr
    assert "1.5" in result.stdout
    assert seen["names"] == ["a", "b"]
    assert (seen["seeds"], seen["budget"], seen["out"]) == ([0, 2], 10, Path(out))
    assert seen["lr"] == [0.5, 0.5]


def test_other_budgets_end_with_a_hint(configs: list[str], tmp_path: Path) -> None:
    result = call("pretrain", "--compare", *configs, "--out", str(tmp_path / "out"))

    assert result.exit_code == ConfigError.exit_code
    assert "train.steps is 10 and not 20" in result.stderr
    assert "--budget" in result.stderr


@pytest.mark.parametrize(
    "extra", [["--seeds", "0,x", "--compare"], ["--seeds", "0,1"], ["--budget", "5"], []]
)
def test_wrong_usage(configs: list[str], extra: list[str]) -> None:
    assert call("pretrain", *configs, *extra).exit_code == USAGE
