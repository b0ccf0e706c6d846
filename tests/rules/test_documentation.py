"""``docs/rules.md`` says what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from surgery import shipped
from surgery.errors import RuleError
from surgery.rules import Recipe
from surgery.rules.document import RECIPE_KEYS, RULE_KEYS, WHERE_KEYS
from surgery.rules.match import SHAPE_KEYS
from surgery.rules.roles import ROLES


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "rules.md").read_text(encoding="utf-8")


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_yaml_is_read_and_the_python_runs(page: str):
    files = [Recipe.loads(text) for text in _blocks(page, "yaml")]
    assert len(files) == 3
    scopes: list[dict[str, Any]] = [{"__name__": "page"} for _ in _blocks(page, "python")]
    for scope, code in zip(scopes, _blocks(page, "python"), strict=True):
        exec(compile(code, "page", "exec", dont_inherit=True), scope)  # noqa: S102 - our own
    assert scopes[0]["recipe"] == files[0]
    with pytest.raises(RuleError, match=r"Widen\.groups: 3 groups do not fit a factor of 2"):
        scopes[1]["Widen"](groups=3)


def test_the_errors_are_the_ones_that_are_shown(page: str):
    text = (
        "version: 1\nrules:\n  - id: adapters\n    pass: lowrank\n    with: {rank: '16'}\n"
        "    optional: true\n  -   pass: lowrnak\n"
    )
    with pytest.raises(RuleError) as raised:
        Recipe.loads(text, file="rules.yaml")
    assert _blocks(page, "text") == [f"{raised.value}\n"]


@pytest.mark.parametrize("keys", [RECIPE_KEYS, RULE_KEYS, WHERE_KEYS, SHAPE_KEYS, ROLES])
def test_every_key_and_role_is_described(page: str, keys: tuple[str, ...]):
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert [key for key in keys if f"`{key}`" not in rows] == []


def test_every_shipped_file_is_described(page: str):
    assert [name for name in shipped.rules() if f"| `{name}`" not in page] == []
