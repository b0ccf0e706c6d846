"""The rule files under ``configs/rules``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from surgery import shipped
from surgery.rules import Recipe, json_schema, yaml

FILES = shipped.rules()


def test_the_files_that_ship():
    assert set(FILES) >= {
        "lora-all-linear",
        "lora-attention",
        "lora-experts",
        "lora-last-8-layers",
        "lora-minilm",
    }


@pytest.mark.parametrize("name", FILES)
def test_shipped_file(name: str):
    recipe = Recipe.load(FILES[name])
    assert recipe.recipe == name, "a table shows the name; it should lead back to the file"
    assert Recipe.loads(recipe.to_yaml()) == recipe
    assert all(not rule.optional for rule in recipe.rules)


@pytest.mark.parametrize("name", FILES)
def test_shipped_file_fits_the_json_schema(name: str):
    data: Any = yaml.load(FILES[name].read_text(encoding="utf-8"), name)[0]
    validator = Draft202012Validator(json_schema())
    assert [error.message for error in validator.iter_errors(data)] == []


@pytest.mark.parametrize("name", FILES)
def test_shipped_file_says_what_it_is_for(name: str):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    header = lines[: lines.index("version: 1")]
    assert len(header) >= 3
    assert all(line.startswith("#") for line in header)
    assert max(len(line) for line in lines) <= 100


def test_every_yaml_file_of_the_folder_ships(root: Path):
    assert {path.stem for path in (root / "configs" / "rules").iterdir()} == set(FILES)
