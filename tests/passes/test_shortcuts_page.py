"""``docs/shortcuts.md`` says what is so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery import Recipe, Rule, Shortcuts

PAGE = (Path(__file__).parents[2] / "docs" / "shortcuts.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    exec(compile("\n".join(blocks("python")), "shortcuts.md", "exec"), scope)  # noqa: S102 - ours
    printed = capsys.readouterr().out
    for shown in blocks("text"):
        assert shown in printed
    weights = scope["FromTheStart"](3)()  # type: ignore[operator]
    assert weights.shape == (3, 3)
    assert not weights.any()


def test_the_yaml_is_the_python() -> None:
    (text,) = blocks("yaml")
    (rule,) = Recipe.loads(text).rules
    assert rule.options == Shortcuts(topology="ancre", init="identity", temperature=0.01)


def test_every_option_is_described() -> None:
    rows = "\n".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    names = [field.name for field in dataclasses.fields(Shortcuts)]
    assert [name for name in names if f"`{name}`" not in rows] == []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


STARTS = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \| (.*?) \| .* \|$", PAGE, re.MULTILINE)


def test_all_starts_are_in_the_table() -> None:
    assert len({start[:3] for start in STARTS}) == 8


@pytest.mark.parametrize(("scope", "mode", "init", "shown"), STARTS)
def test_matrices_start_as_the_table_says(scope, mode, init, shown) -> None:
    model = nn.Sequential(Block(), Block(), Block())
    rule = Rule(Shortcuts(scope=scope, mode=mode, init=init))
    surgery.apply(model, rule, example=torch.randn(2, 4))
    (matrix,) = surgery.shortcuts(model).values()
    uniform = torch.ones(3, 3).tril() / torch.arange(1, 4)[:, None]
    expected = {
        "1/(k+1) in row k": uniform,
        "zero": torch.zeros(3, 3),
        "the unit matrix": torch.eye(3),
    }
    torch.testing.assert_close(matrix, expected[shown])
