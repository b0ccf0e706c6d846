"""The mechanism, with versions 2 and 3 that exist only here."""

from __future__ import annotations

from typing import Any

import pytest

from surgery.errors import RuleError
from surgery.rules import Recipe, Rule, migrate
from tests.rules.samples import Patch


def _with_was_options(data: dict[str, Any]) -> dict[str, Any]:
    """1 → 2: what is called ``with`` now was called ``options`` then."""
    for rule in data["rules"]:
        if "options" in rule:
            rule["with"] = rule.pop("options")
    return data


def _rules_was_a_mapping(data: dict[str, Any]) -> dict[str, Any]:
    """2 → 3: what is a list now was a mapping of ids then. Builds a new document."""
    rules = [{"id": name, **rule} for name, rule in data["rules"].items()]
    return {**data, "rules": rules}


@pytest.fixture
def at_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "VERSION", 2)
    monkeypatch.setattr(migrate, "STEPS", {1: _with_was_options})


@pytest.mark.usefixtures("at_two")
def test_an_older_file_is_migrated():
    old = Recipe.loads("version: 1\nrules:\n  - {pass: patch, options: {rank: 3}}\n")
    new = Recipe.loads("version: 2\nrules:\n  - {pass: patch, with: {rank: 3}}\n")
    assert old == new == Recipe([Rule(Patch(rank=3))])
    assert old.version == 2
    assert old.to_yaml().startswith("version: 2\n")


@pytest.mark.usefixtures("at_two")
def test_errors_in_a_migrated_file_tell_its_own_lines():
    text = "version: 1\nrules:\n  - pass: patch\n    options:\n      rank: 3\n      alpha: x\n"
    with pytest.raises(RuleError) as raised:
        Recipe.loads(text, file="old.yaml")
    assert str(raised.value).startswith(
        "old.yaml:6:14: rule 1 (patch), with.alpha: expected a number, got the string 'x'"
    )


@pytest.mark.usefixtures("at_two")
@pytest.mark.parametrize("version", [0, 3])
def test_other_versions_are_refused_naming_those_that_work(version: int):
    message = f"version: {version} is not a supported version; this release reads 1 to 2"
    with pytest.raises(RuleError, match=message):
        Recipe.loads(f"version: {version}\nrules: [{{pass: patch}}]")


def test_steps_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def two(data: dict[str, Any]) -> dict[str, Any]:
        seen.append(data["version"])
        return _rules_was_a_mapping(data)

    monkeypatch.setattr(migrate, "VERSION", 4)
    monkeypatch.setattr(migrate, "STEPS", {2: two, 3: lambda data: seen.append(3) or data})
    assert migrate.supported() == range(2, 5)
    recipe = Recipe.loads("version: 2\nrules:\n  adapters: {pass: patch}\n")
    assert [rule.id for rule in recipe.rules] == ["adapters"]
    assert seen == [2, 3]


def test_a_document_that_a_step_builds_anew_still_has_a_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(migrate, "VERSION", 3)
    monkeypatch.setattr(migrate, "STEPS", {2: _rules_was_a_mapping})
    with pytest.raises(RuleError, match="unknown option 'rnak'") as raised:
        Recipe.loads("# x\nversion: 2\nrules:\n  a: {pass: patch, with: {rnak: 3}}\n")
    assert (raised.value.line, raised.value.column) == (4, 27)


def test_a_gap_in_the_steps_ends_what_is_supported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(migrate, "VERSION", 4)
    monkeypatch.setattr(migrate, "STEPS", {1: _with_was_options, 3: _with_was_options})
    assert migrate.supported() == range(3, 5)


def test_version_1_is_current_and_nothing_is_migrated_to_it():
    assert migrate.VERSION == 1
    assert migrate.STEPS == {}
    assert migrate.supported() == range(1, 2)
