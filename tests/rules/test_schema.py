from __future__ import annotations

import copy
import json
import os
import pickle
import re
import stat
from collections.abc import Callable
from pathlib import Path as FilePath
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import RuleError
from surgery.rules import CreatedBy, Layers, Path, Recipe, Role, Rule, Shape, Where
from tests.rules.samples import Keep, Needy, Patch, Plain, Window, recipes, wheres

few = settings(max_examples=40)  # a recipe takes a while to draw

TEXT = """\
version: 1
recipe: two-rules
seed: 3
rules:
  - id: adapters
    pass: patch
    where: {role: [attention.qkv, attention.out], layers: "-8:"}
    except: {path: "**.layers.0.**"}
    with: {method: reflora, rank: 16, alpha: 32, keep: memory, window: {stop: 3}}
  - pass: needy
    where:
      any:
        - {created_by: adapters}
        - {shape: {in: ">=256", rank: 3}}
    with: {size: 1}
    optional: true
"""

RECIPE = Recipe(
    recipe="two-rules",
    seed=3,
    rules=[
        Rule(
            Patch(method="reflora", rank=16, alpha=32, keep=Keep.MEMORY, window=Window(stop=3)),
            where=Role("attention.qkv", "attention.out") & Layers("-8:"),
            except_=Path("**.layers.0.**"),
            id="adapters",
        ),
        Rule(
            Needy(size=1),
            where=CreatedBy("adapters") | Shape(in_=">=256", rank=3),
            optional=True,
        ),
    ],
)

WRITTEN = """\
version: 1
recipe: two-rules
seed: 3
rules:
  - id: adapters
    pass: patch
    where: {role: [attention.qkv, attention.out], layers: "-8:"}
    except: {path: "**.layers.0.**"}
    with:
      rank: 16
      alpha: 32.0
      dropout: 0.0
      method: reflora
      label: default
      slices: null
      every: auto
      bias: false
      keep: memory
      window: {start: 0, stop: 3}
      weights: null
      windows: null
      notes: null
  - id: needy
    pass: needy
    where: {any: [{created_by: adapters}, {shape: {in: ">=256", rank: 3}}]}
    with: {size: 1}
    optional: true
"""


def test_a_file_and_python_say_the_same():
    assert Recipe.loads(TEXT) == RECIPE


def test_what_a_recipe_looks_like_when_it_is_written():
    assert RECIPE.to_yaml() == WRITTEN


@few
@given(recipes())
def test_python_to_yaml_and_back(recipe: Recipe):
    text = recipe.to_yaml()
    assert Recipe.loads(text) == recipe
    assert Recipe.loads(text).to_yaml() == text


@few
@given(recipes())
def test_python_to_data_and_back(recipe: Recipe):
    data = json.loads(json.dumps(recipe.dump(), allow_nan=False))
    assert Recipe.parse(data) == recipe
    assert Recipe.parse(recipe.dump()).dump() == recipe.dump()


@few
@given(recipes(), st.randoms(use_true_random=False))
def test_yaml_to_python_and_back(recipe: Recipe, random: Random):
    """However a file is laid out, it says the same as the recipe that is written from it."""
    text = "\n".join(_laid_out(recipe.dump(), random))
    read = Recipe.loads(text)
    assert read == recipe
    assert read.dump() == recipe.dump()


def _laid_out(data: Any, random: Random) -> list[str]:
    """Lines of YAML, each mapping and list in block or in flow style."""
    if not isinstance(data, dict | list) or not data or random.random() < 0.2:
        return [_flow(data, random)]
    lines: list[str] = []
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        inner = _laid_out(value, random)
        head = f"{_flow(key, random)}:" if isinstance(data, dict) else "-"
        if len(inner) == 1 and _is_flow(inner[0], value):
            lines.append(
                f"{head} {inner[0]}  # a comment" if random.random() < 0.5 else f"{head} {inner[0]}"
            )
            continue
        lines += [head, *(f"   {line}" for line in inner)]
    return lines


def _is_flow(line: str, value: Any) -> bool:
    return not isinstance(value, dict | list) or line[0] in "{["


def _flow(data: Any, random: Random) -> str:
    space = random.choice(["", " "])
    if isinstance(data, dict):
        items = (f"{_flow(key, random)}: {_flow(item, random)}" for key, item in data.items())
        return f"{{{space}{f',{space}'.join(items)}{space}}}"
    if isinstance(data, list):
        return f"[{space}{f',{space}'.join(_flow(item, random) for item in data)}{space}]"
    if isinstance(data, str) and data.isprintable() and random.random() < 0.5:
        quoted = data.replace("'", "''")
        return f"'{quoted}'"
    if isinstance(data, str):  # JSON's escapes are YAML's, but for its pairs of surrogates
        return f'"{"".join(c if ord(c) > 0xFFFF else json.dumps(c)[1:-1] for c in data)}"'
    return json.dumps(data)


@given(wheres([]))
def test_a_condition_survives_the_file(where: Where):
    recipe = Recipe(rules=[Rule(Patch(), where=where, except_=~where)])
    rule = Recipe.loads(recipe.to_yaml()).rules[0]
    assert (rule.where, rule.except_) == (where, ~where)


@few
@given(recipes())
def test_recipes_are_values(recipe: Recipe):
    assert copy.deepcopy(recipe) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301 - our own bytes


IDS: list[tuple[list[str], list[str]]] = [
    # ids that are given, ids that the rules get
    (["", "", ""], ["patch", "patch-2", "patch-3"]),
    (["", "patch", ""], ["patch-2", "patch", "patch-3"]),
    (["patch-2", "", ""], ["patch-2", "patch", "patch-3"]),
    (["a", "", "b"], ["a", "patch", "b"]),
]


@pytest.mark.parametrize(("given_ids", "expected"), IDS)
def test_default_ids(given_ids: list[str], expected: list[str]):
    recipe = Recipe(rules=[Rule(Patch(), id=name) for name in given_ids])
    assert [rule.id for rule in recipe.rules] == expected
    assert [rule.id for rule in Recipe.loads(recipe.to_yaml()).rules] == expected


def test_defaults():
    recipe = Recipe.loads("version: 1\nrules: [{pass: patch}]")
    assert recipe == Recipe(rules=[Rule(Patch())])
    assert (recipe.version, recipe.recipe, recipe.seed) == (1, "unnamed", 0)
    assert recipe.rules[0] == Rule(Patch(), where=None, except_=None, id="patch", optional=False)


def test_layers_may_be_numbers_and_texts():
    recipe = Recipe.loads('version: 1\nrules: [{pass: patch, where: {layers: [0, -1, "2", "4:"]}}]')
    assert recipe.rules[0].where == Layers(0, -1, 2, "4:")


# What a type checker would refuse is tested all the same.
_patch: Any = Patch
_rule: Any = Rule
_recipe: Any = Recipe

BAD: list[tuple[Callable[[], object], str]] = [
    (
        lambda: _patch(rank="16"),
        "Patch.rank: expected an integer, got the string '16'",
    ),
    (lambda: _patch("16"), "Patch.rank: expected an integer, got the string '16'"),
    (lambda: _patch(rnak=1), "Patch: unknown argument 'rnak'\n  hint: did you mean 'rank'?"),
    (lambda: _patch(slices=["q", 1]), "Patch.slices[1]: expected"),
    (lambda: _patch(slices="q"), "Patch.slices: expected a list, got the string 'q'"),
    (lambda: _patch(rank=[8]), "Patch.rank: expected an integer, got a list"),
    (lambda: _patch(*range(15)), "Patch: too many arguments, the first of them the integer 13"),
    (lambda: Patch(alpha=float("nan")), "Patch.alpha: must be a finite number, got nan"),
    (lambda: Patch(method="reflora", slices=("q",)), "Patch.slices: reflora adapts a layer as a"),
    (
        lambda: _patch(window={"start": 1}),
        "Patch.window: expected an instance of Window, got a",
    ),
    (_rule, "Rule: missing argument 'options'"),
    (lambda: _rule(Patch), "Rule.options: expected a pass with its options, got the class Patch"),
    (lambda: _rule("patch"), "expected a pass with its options, got the string 'patch'"),
    (lambda: _rule(Window()), "Rule.options: Window is not a pass: its class has no 'name'"),
    (
        lambda: _rule(Patch(), where="a"),
        "Rule.where: expected an instance of Where, got the",
    ),
    (
        lambda: _rule(Patch(), where={"path": "a"}),
        "Rule.where: expected an instance of Where, got a",
    ),
    (
        lambda: _rule(Patch(), optional=1),
        "Rule.optional: expected true or false, got the int",
    ),
    (lambda: Rule(Patch(), id="my rule"), "Rule.id: 'my rule' cannot be an id"),
    (lambda: Recipe(rules=[]), "Recipe.rules: the list is empty; a recipe has at least one rule"),
    (lambda: _recipe(Rule(Patch())), "Recipe.rules: expected a list, got an object of type Rule"),
    (lambda: _recipe([Patch()]), "Recipe.rules[0]: expected an instance of Rule, got an object of"),
    (lambda: Recipe([Rule(Patch())], seed=-1), "Recipe.seed: must be at least 0, got -1"),
    (lambda: Recipe([Rule(Patch())], version=2), "Recipe.version: 2 is not a supported version"),
    (lambda: Recipe([Rule(Patch(), id="a")] * 2), "rule 'a', id: rule 1 already has the id 'a'"),
    (
        lambda: Recipe([Rule(Patch(), where=CreatedBy("later")), Rule(Patch(), id="later")]),
        "rule 1 (patch), where.created_by: rule 'later' comes later",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_object(build: Callable[[], object], message: str):
    with pytest.raises(RuleError, match=re.escape(message)) as raised:
        build()
    assert raised.value.line is None
    assert raised.value.__cause__ is None


def test_a_plain_pydantic_pass_works():
    assert Recipe.loads("version: 1\nrules: [{pass: plain}]").rules[0].options == Plain()


def test_load_and_save(tmp_path: FilePath):
    path = tmp_path / "rules.yaml"
    RECIPE.save(path)
    assert path.read_text(encoding="utf-8") == WRITTEN
    assert Recipe.load(path) == RECIPE
    assert Recipe.load(str(path)) == RECIPE
    assert [found.name for found in tmp_path.iterdir()] == ["rules.yaml"]
    path.chmod(0o600)
    RECIPE.save(path)
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR


def test_a_save_that_fails_leaves_the_old_file(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rules.yaml"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuleError, match="cannot be written: No space left on device"):
        RECIPE.save(path)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["rules.yaml"]


def test_save_into_no_folder(tmp_path: FilePath):
    with pytest.raises(RuleError, match="cannot be written: No such file or directory"):
        RECIPE.save(tmp_path / "no" / "rules.yaml")


def test_no_such_file(tmp_path: FilePath):
    (tmp_path / "lora-attention.yaml").write_text(TEXT)
    with pytest.raises(RuleError) as raised:
        Recipe.load(tmp_path / "lora-atention.yaml")
    assert str(raised.value) == (
        f"{tmp_path / 'lora-atention.yaml'}: there is no such file\n"
        "  hint: did you mean 'lora-attention.yaml'?"
    )


def test_no_such_folder(tmp_path: FilePath):
    with pytest.raises(RuleError) as raised:
        Recipe.load(tmp_path / "no" / "rules.yaml")
    assert raised.value.hint == f"there is no folder {tmp_path / 'no'} either"


def test_a_folder_is_no_file(tmp_path: FilePath):
    (tmp_path / "a.yaml").write_text(TEXT)
    with pytest.raises(RuleError, match="this is a folder; expected a rule file") as raised:
        Recipe.load(tmp_path)
    assert raised.value.hint == "known: a.yaml"
