"""The code of ``docs/finetuning.md`` runs as it stands there, on a small model."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from tests.train.finetune import tiny
from tests.train.finetune.test_callback import Numbers

PAGE = (Path(__file__).parents[3] / "docs" / "finetuning.md").read_text(encoding="utf-8")
RULES = """version: 1
recipe: adapters
rules:
  - {id: adapters, pass: lowrank, where: {role: [attention.q]}, with: {rank: 2}}
"""
HUB = "hub:sentence-transformers/all-MiniLM-L6-v2"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def swapped(text: str, old: str, new: str) -> str:
    """A text with another value in it, which must be there."""
    assert old in text
    return text.replace(old, new)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny.bert(tmp_path / "bert")
    with Path("reviews.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [[f"{each['text']} {number}", number % 5] for number, each in enumerate(tiny.rows())]
        csv.writer(file).writerows([["review", "stars"], *rows])
    (config,) = blocks("yaml")
    Path("my.yaml").write_text(swapped(config, HUB, str(source)), encoding="utf-8")
    Path("rules.yaml").write_text(RULES, encoding="utf-8")
    of_models, of_adapters, of_trainers, of_loops = blocks("python")
    trainers = swapped(of_trainers, "checkpoint-500", "checkpoint-2")
    args = TrainingArguments(
        output_dir="out", max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    scope = {"__name__": "page", "source": source, "args": args, "data": Numbers()}
    code = "\n".join([of_models, of_adapters, trainers, of_loops])
    exec(compile(code, "finetuning.md", "exec"), scope)  # noqa: S102 - our own page
    assert Path("out/checkpoint-2").is_dir()
    assert Path("runs/reviews/adapter").is_dir()
