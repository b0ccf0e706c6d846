from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from surgery import registry
from surgery.errors import RuleError
from surgery.rules import Recipe, json_schema
from tests.rules.samples import recipes

DOCUMENT: dict[str, Any] = {
    "version": 1,
    "recipe": "x",
    "seed": 0,
    "rules": [
        {
            "id": "a",
            "pass": "patch",
            "where": {"role": ["attention", "mlp.out"], "layers": [0, "-8:"]},
            "except": {"any": [{"path": "**"}, {"not": {"shape": {"in": ">=256", "out": 8}}}]},
            "with": {"rank": 4, "slices": ["q"], "window": {"start": 1}, "keep": "none"},
            "optional": True,
        },
        {"pass": "needy", "with": {"size": 3}},
    ],
}

BROKEN: list[tuple[list[Any], Any]] = [
    # where, what is put there
    (["version"], 2),
    (["version"], "1"),
    (["seed"], -1),
    (["seed"], "1"),
    (["rules"], []),
    (["rules"], {}),
    (["sede"], 1),
    (["rules", 0, "pass"], "pacth"),
    (["rules", 0, "id"], "a b"),
    (["rules", 0, "optional"], "yes"),
    (["rules", 0, "rank"], 3),
    (["rules", 0, "where"], {}),
    (["rules", 0, "where"], None),
    (["rules", 0, "where", "rolle"], "norm"),
    (["rules", 0, "where", "role"], "atention"),
    (["rules", 0, "where", "role"], []),
    (["rules", 0, "where", "layers"], True),
    (["rules", 0, "where", "layers"], "last"),
    (["rules", 0, "except", "any"], {"path": "a"}),
    (["rules", 0, "except", "any", 0, "pth"], "a"),
    (["rules", 0, "except", "any", 1, "not", "shape", "inn"], 3),
    (["rules", 0, "except", "any", 1, "not", "shape", "in"], "big"),
    (["rules", 0, "with", "rnak"], 3),
    (["rules", 0, "with", "rank"], 0),
    (["rules", 0, "with", "rank"], "4"),
    (["rules", 0, "with", "method"], "lorra"),
    (["rules", 0, "with", "slices"], ["w"]),
    (["rules", 0, "with", "keep"], "disk"),
    (["rules", 0, "with", "window", "begin"], 0),
    (["rules", 0, "with"], None),
    (["rules", 1, "with"], {}),
    (["rules", 1, "with", "rank"], 3),
    (["rules", 1], {"pass": "needy"}),
    (["rules", 1], {"id": "x"}),
]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_a_right_file_is_valid(validator: Draft202012Validator):
    Recipe.parse(DOCUMENT)
    assert [error.message for error in validator.iter_errors(DOCUMENT)] == []


@pytest.mark.parametrize(("way", "value"), BROKEN)
def test_a_wrong_file_is_invalid(validator: Draft202012Validator, way: list[Any], value: object):
    broken = copy.deepcopy(DOCUMENT)
    inner: Any = broken
    for step in way[:-1]:
        inner = inner[step]
    inner[way[-1]] = value
    assert not validator.is_valid(broken)
    with pytest.raises(RuleError):
        Recipe.parse(broken)


@settings(max_examples=40)
@given(recipe=recipes())
def test_every_recipe_is_valid(validator: Draft202012Validator, recipe: Recipe):
    assert [error.message for error in validator.iter_errors(recipe.dump())] == []


def test_what_an_editor_shows():
    schema = json_schema()
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    rule = schema["properties"]["rules"]["items"]
    assert {"patch", "needy", "plain", "lowrank"} <= set(rule["properties"]["pass"]["enum"])
    (lowrank,) = [
        branch["then"]["properties"]["with"]
        for branch in rule["allOf"]
        if branch["if"]["properties"]["pass"]["const"] == "lowrank"
    ]
    assert lowrank["description"].startswith("Contract ``exact``")
    assert lowrank["properties"]["rank"]["description"].startswith("Rank of the change")
    assert lowrank["properties"]["rank"]["default"] == 8
    assert all("description" in option for option in lowrank["properties"].values())


def test_a_pass_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry.PASSES._builtin, "broken", "surgery.no_such_module:Broken")
    with pytest.raises(RuleError, match=r"pass 'broken' \(surgery\.no_such_module:Broken\) cannot"):
        json_schema()
