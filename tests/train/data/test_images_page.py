"""The examples in the image part of docs/data.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from surgery.rules import yaml
from surgery.train.data import OPENERS
from surgery.train.data.configs import DataConfig

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
IMAGES = PAGE.read_text().partition("\n## Images\n")[2]
BLOCKS = re.findall(r"```yaml\n(.*?)```", IMAGES, re.DOTALL)


def kind_of(block: str) -> str:
    return re.findall(r"kind: (\w+)", block)[0]


@pytest.mark.parametrize("block", BLOCKS, ids=kind_of)
def test_examples_are_valid_and_survive_being_written(block: str):
    loaded, _ = yaml.load(block, "docs/data.md")
    section = TypeAdapter(DataConfig).validate_json(json.dumps(loaded["data"]))
    # As a run's resolved configuration is written and read back.
    assert TypeAdapter(DataConfig).validate_json(section.model_dump_json()) == section


def test_there_is_an_example_of_every_kind():
    language = {"text", "tokens", "stream"}
    fine_tuning = {"records", "hub", "docstrings", "shifted-digits"}  # docs/finetuning.md
    assert sorted(map(kind_of, BLOCKS)) == sorted(OPENERS.keys() - language - fine_tuning)
