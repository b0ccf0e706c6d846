"""A stratified part of the survival table; ``make survival`` runs every cell."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from surgery.sources.examples import Example
from tests.survival.calls import rewire
from tests.survival.models import NAMED
from tests.survival.page import PAGE, load, page
from tests.survival.reference import COLUMNS, MAIN, RESIDUAL, Column
from tests.survival.rows import BY_KEY, ROWS
from tests.survival.run import cells
from tests.survival.upstream import UPSTREAM
from tests.survival.worker import attempt

pytestmark = [
    # Advice of the libraries that the models come from. What this library warns of stays an error.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::surgery"),
    pytest.mark.filterwarnings("error:::architectures"),
]

#: (model, column, row): every model and every column. Of the rows with compilers and processes of
#: their own there is one cell each; they are left to the table.
STRATA = [
    ("Llama", "ancre", "generate"),
    ("Llama", "residual, replace", "two-forwards"),
    ("Llama", "denseformer", "checkpointing"),
    ("Qwen3", "ancre", "two-forwards-reentrant"),
    ("GPT-2", "ancre", "hidden-states"),
    ("BERT", "ancre", "hidden-states"),
    ("BERT", "residual, add", "gradients"),
    ("BERT", "block, replace", "export"),
    ("T5", "ancre", "generate"),
    ("Mixtral", "ancre", "save"),
    ("DiT", "ancre", "dropout"),
    ("PixArt", "ancre", "shapes"),
    ("SD3", "ancre", "gradients"),
    ("Flux", "ancre", "checkpointing"),
    ("UNet2DConditionModel", "ancre", "eager"),
    ("ViT", "ancre", "checkpointing-reentrant"),
    ("ViT", "residual, add", "autocast"),
    ("ViT", "ancre", "compile-checkpointing"),
    ("Swin", "ancre", "threads"),
    ("ResNet-50", "ancre", "functional-call"),
    ("ResNet-50", "residual, replace", "eager"),
    ("ConvNeXt", "ancre", "deepcopy"),
    ("EfficientNet", "ancre", "autocast"),
]


@pytest.mark.parametrize(("model", "column", "row"), STRATA)
def test_survival(model: str, column: str, row: str) -> None:
    outcome = attempt(model, column, row, {})
    assert not outcome.error, outcome.trace


def test_fsdp2_in_processes_of_its_own() -> None:
    """By the command: a process that has computed gradients cannot fork ranks."""
    cell = ["--only", "BERT", "--columns", "ancre", "--rows", "fsdp2", "--rewritten"]
    command = [sys.executable, "-m", "tests.survival.run", *cell]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "1 cells, 0 failed" in done.stdout, done.stdout + done.stderr


def test_the_strata_have_every_model_and_column() -> None:
    assert {model for model, _, _ in STRATA} == NAMED.keys()
    assert {column for _, column, _ in STRATA} == COLUMNS.keys()


def test_no_excuse_for_the_four() -> None:
    assert not {model for model, _ in UPSTREAM} & RESIDUAL.keys()
    assert {row for _, row in UPSTREAM} <= BY_KEY.keys()


def test_no_cell_of_the_results_fails() -> None:
    known = {(job.model, job.column, job.row) for job in cells(NAMED.values(), COLUMNS, ROWS)}
    found = {cell.key: cell for cell in load().cells}
    assert found.keys() == known
    assert {key: cell.cause for key, cell in found.items() if cell.status == "FAIL"} == {}


def test_no_cell_is_excused_that_is_not_listed() -> None:
    excused = {
        (cell.model, cell.row): cell.cause for cell in load().cells if cell.status == "excused"
    }
    assert excused == {key: known.cause for key, known in UPSTREAM.items()}


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(load())


def test_a_wrong_formula_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewrite of one column against the reference of another."""

    def another(model: nn.Module, example: Example, _: Column) -> nn.Module:
        return rewire(model, example, COLUMNS["block, replace"])

    monkeypatch.setattr("tests.survival.calls.rewire", another)
    assert "differs" in attempt("Llama", MAIN.name, "eager", {}).error
