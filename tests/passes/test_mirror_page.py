"""``docs/mirror.md`` says what is so."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from architectures.mirror import BlockIAF, Diagonal, LayerIAF, Legendre, MirrorMap
from surgery import CreatedBy, LowRank, Mirror, Recipe, Role, Rule, shipped
from surgery.registry import MIRRORS

PAGE = (Path(__file__).parents[2] / "docs" / "mirror.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scope = {"__name__": "page"}
        exec(compile("\n".join(blocks("python")), "mirror.md", "exec"), scope)  # noqa: S102 - ours
    assert capsys.readouterr().out == "".join(blocks("text"))


def test_the_rules_of_the_page() -> None:
    (text,) = blocks("yaml")
    mirror = Recipe.loads(text).rules[1].options
    assert mirror == Mirror(map="legendre", options={"rank": 2})


def rows(name: str) -> list[list[str]]:
    """The cells of the table under a heading or with one in its first row."""
    lines = PAGE[PAGE.index(name) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_option_is_in_the_table() -> None:
    told: dict[str, dict[str, str]] = {}
    current = ""
    for name, option, default, _ in rows("| map | option |"):
        current = name.strip("`") or current
        told.setdefault(current, {})[option.strip("`")] = default.strip("`")
    assert set(told) == set(MIRRORS.names())
    for name, options in told.items():
        fields = dataclasses.fields(MIRRORS.get(name).Options)
        shown = {
            field.name: str(
                list(field.default) if isinstance(field.default, tuple) else field.default
            )
            for field in fields
        }
        assert options == shown


CONV = [
    shape for width in (3, 64, 64, 64) for shape in ((64, width, 3, 3), (64,), (64,), (64,))
] + [(5, 1600), (5,)]


def count(*made: nn.Module) -> int:
    return sum(parameter.numel() for each in made for parameter in each.parameters())


def conv_cost(kind: type[MirrorMap], **options: object) -> int:
    chosen = kind.Options(**options)
    if kind.couples:
        return count(kind(CONV, options=chosen, device="meta"))
    return count(*(kind([shape], options=chosen, device="meta") for shape in CONV))


def cell(row: str, column: int) -> int | None:
    found = next(cells for cells in rows("| map | 4-conv") if cells[0] == row)[column]
    return int(found.replace(",", "")) if found else None


def test_what_the_maps_of_the_convolutions_cost() -> None:
    assert sum(map(math.prod, CONV)) == 121_093
    assert cell("`block_iaf`", 1) == conv_cost(BlockIAF)
    assert cell("`block_iaf`, `shrink: [4, 4, 4]`", 1) == conv_cost(BlockIAF, shrink=(4, 4, 4))
    assert cell("`layer_iaf`", 1) == conv_cost(LayerIAF)
    assert cell("`diagonal`", 1) == conv_cost(Diagonal)
    assert cell("`diagonal`, `share: element`", 1) == conv_cost(Diagonal, share="element")
    assert cell("`legendre`", 1) == conv_cost(Legendre)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_the_maps_of_minilm_cost() -> None:
    config = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12}
    model = surgery.load(
        "transformers:BertModel", config={**config, "intermediate_size": 1536}, device="meta"
    )
    assert round(count(model) / 1e6, 1) == 22.7
    lora = Rule(LowRank(rank=4), where=Role("attention.q", "attention.v"), id="lora")

    def added(name: str) -> int:
        rules = [lora, Rule(Mirror(map=name), where=CreatedBy("lora"))]
        plan = surgery.plan(model, rules)
        return sum(s.numel for e in plan.edits if e.rule != "lora" for s in e.adds.values())

    for name in MIRRORS.names():
        assert cell(f"`{name}`", 2) == added(name)
    plan = surgery.plan(model, Recipe.load(shipped.rules()["mirror-adapters"]))
    shown = cell("`block_iaf`, `blocks: module, shrink: [16, 4]`", 2)
    assert plan.totals.added == 36_864 + (shown or 0)
