"""Pages of studies are what their scripts make of the numbers, and nothing else."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(name: str, folder: str = "") -> Any:
    """A script of ours; their folders are no packages."""
    sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / folder)]
    try:
        return importlib.import_module(name)
    finally:
        del sys.path[:2]


@pytest.mark.parametrize(("script", "folder"), [("compare", "adapters"), ("evidence", "pretrain")])
def test_a_page_is_what_its_script_writes(script: str, folder: str, tmp_path: Path) -> None:
    study = module(script, folder)
    place = study.Place(tmp_path, study.PLACE.results, tmp_path / "page.md", study.PLACE.images)
    study.write_page(place)
    assert place.page.read_text() == study.PLACE.page.read_text(), f"run {script}.py --page"


def test_what_was_not_run_says_so() -> None:
    columns = {"name": "method", "loss": "loss"}
    table = module("study").markdown(columns, [{"name": "a", "loss": "1"}], ["a", "b"])
    assert table.splitlines()[2:] == ["| a | 1 |", "| b | not run |"]


def test_a_trial_leaves_the_documentation_alone() -> None:
    place = module("study").Place.named("adapters", str(BENCHMARKS / "adapters" / "x.py"), "x.md")
    assert place.of(None).page.parent.name == "docs"
    trial = place.of(3)
    assert all(
        each.is_relative_to(place.runs) for each in (trial.page, trial.results, trial.images)
    )


def test_a_name_that_is_not_known_is_refused() -> None:
    read = module("study").names_of({"lora": None, "dora": None})
    assert read("dora,lora") == ["dora", "lora"]
    with pytest.raises(argparse.ArgumentTypeError, match="unknown: dra; known: lora, dora"):
        read("dra")
