"""Rule files that are wrong: what is said about them, and where.

In every case, « stands before the character that the error must point at.
"""

from __future__ import annotations

import re

import pytest

from surgery import registry
from surgery.errors import RuleError
from surgery.rules import Recipe
from surgery.rules.document import RECIPE_KEYS, RULE_KEYS, WHERE_KEYS, RecipeDocument, RuleDocument
from surgery.rules.where import Where

TOP = "version: 1\nrules:\n"


def where(text: str) -> str:
    return f"{TOP}  - pass: patch\n    where: {text}\n"


def options(text: str) -> str:
    return f"{TOP}  - {{id: adapters, pass: patch, with: {text}}}\n"


CASES: dict[str, tuple[str, str, str | None]] = {
    # name: text, message without its place in the file, hint
    # The document
    "a list": (
        "«[1]",
        "a rule file is a mapping with the keys version, recipe, seed, rules; got a list",
        None,
    ),
    "a word": ("«hello", "got the string 'hello'", None),
    "null": ("«null", "got nothing", None),
    "no version": (
        "«rules: []",
        "missing key 'version'",
        "start the file with 'version: 1'",
    ),
    "no rules": ("«version: 1", "missing key 'rules'", None),
    "empty rules": (
        "version: 1\nrules: «[]",
        "rules: the list is empty; a recipe has at least one",
        None,
    ),
    "null rules": ("version: 1\n«rules:", "rules: expected a list, got nothing", "give it a value"),
    "rules a mapping": (
        "version: 1\nrules:\n  «pass: patch\n",
        "rules: expected a list, got a mapping",
        "put '- ' before each item",
    ),
    "a rule is a word": (
        TOP + "  - «patch",
        "rule 1: expected a mapping, got the string 'patch'",
        None,
    ),
    "unknown top key": (
        "version: 1\n«rulse: []\nrules: [{pass: patch}]",
        "unknown key 'rulse'",
        "did you mean 'rules'?",
    ),
    "rule key at the top": (
        "version: 1\n«pass: patch\nrules: [{pass: patch}]",
        "unknown key 'pass'",
        "'pass' belongs to a rule: put it into an item of 'rules'",
    ),
    "version is text": (
        "version: «'1'\nrules: [{pass: patch}]",
        "version: expected an integer, got the string '1'",
        "write 'version: 1'",
    ),
    "version is true": (
        "version: «true\nrules: []",
        "version: expected an integer, got true",
        None,
    ),
    "newer version": (
        "version: «2\nrules: [{pass: what-version-2-has}]",
        "version: 2 is not a supported version; this release reads 1",
        "upgrade model-surgery",
    ),
    "older version": (
        "version: «0\nrules: []",
        "version: 0 is not a supported version; this release reads 1",
        "write the rules for version 1",
    ),
    "seed is text": (
        "version: 1\nseed: «'3'\nrules: [{pass: patch}]",
        "seed: expected an integer, got the string '3'",
        "remove the quotes",
    ),
    "seed is a fraction": (
        "version: 1\nseed: «1.5\nrules: [{pass: patch}]",
        "seed: expected an integer, got the number 1.5",
        None,
    ),
    "negative seed": (
        "version: 1\nseed: «-1\nrules: [{pass: patch}]",
        "seed: must be at least 0, got -1",
        None,
    ),
    "recipe is a number": (
        "version: 1\nrecipe: «7\nrules: [{pass: patch}]",
        "recipe: expected a string, got the integer 7",
        "put it into quotes",
    ),
    "empty recipe name": (
        'version: 1\nrecipe: «""\nrules: [{pass: patch}]',
        "recipe: must not be empty",
        None,
    ),
    # A rule
    "no pass": (TOP + "  - «id: x", "rule 'x': missing key 'pass'", None),
    "unknown pass": (
        TOP + "  - pass: «pacth\n    with: {rank: no matter}",
        "rule 1 (pacth), pass: unknown pass 'pacth'",
        "did you mean 'patch'?",
    ),
    "pass is null": (TOP + "  - «pass: \n", "rule 1, pass: expected a string, got nothing", None),
    "unknown rule key": (
        TOP + "  - pass: patch\n    «wehre: {path: a}",
        "rule 1 (patch): unknown key 'wehre'",
        "did you mean 'where'?",
    ),
    "option beside with": (
        TOP + "  - pass: patch\n    «rank: 3",
        "rule 1 (patch): unknown key 'rank'",
        "options of the pass go under 'with': with: {rank: ...}",
    ),
    "selector beside where": (
        TOP + "  - pass: patch\n    «layers: 3",
        "rule 1 (patch): unknown key 'layers'",
        "selectors go under 'where': where: {layers: ...}",
    ),
    "optional is yes": (
        TOP + "  - pass: patch\n    optional: «yes",
        "rule 1 (patch), optional: expected true or false, got the string 'yes'",
        "write true or false, without quotes; yes, no, on and off are plain text",
    ),
    "optional is 1": (
        TOP + "  - {pass: patch, optional: «1}",
        "expected true or false, got the integer 1",
        None,
    ),
    "bad id": (
        TOP + "  - pass: patch\n    id: «my rule",
        "rule 'my rule', id: 'my rule' cannot be an id",
        "an id has 1 to 64 letters",
    ),
    "empty id": (
        TOP + "  - {pass: patch, id: «''}",
        "rule 1 (patch), id: '' cannot be an id",
        None,
    ),
    "null id": (
        TOP + "  - pass: patch\n    «id:",
        "rule 1 (patch), id: expected a string, got nothing",
        "give it a value, or leave the key out to use the default",
    ),
    "doubled id": (
        TOP + "  - {pass: patch, id: a}\n  - {pass: needy, id: «a, with: {size: 1}}",
        "rule 'a', id: rule 1 already has the id 'a'",
        "give each rule an id of its own",
    ),
    # where
    "where is null": (
        TOP + "  - pass: patch\n    «where:\n    except: {path: a}",
        "rule 1 (patch), where: nothing follows the key",
        "indent what belongs to it, or remove it",
    ),
    "where is empty": (where("«{}"), "where: selects by nothing", "name a path, type, role"),
    "where is text": (where("«all"), "where: expected a mapping, got the string 'all'", None),
    "unknown selector": (
        where("{«rolle: norm}"),
        "rule 1 (patch), where: unknown key 'rolle'",
        "did you mean 'role'?",
    ),
    "unknown role": (
        where("{role: [norm, «atention]}"),
        "rule 1 (patch), where.role[1]: unknown role 'atention'",
        "did you mean 'attention'",
    ),
    "role is a number": (
        where("{role: «3}"),
        "where.role: expected a string, got the integer 3",
        None,
    ),
    "empty list": (
        where("{type: «[]}"),
        "where.type: the list is empty, so nothing could match",
        "leave the key out",
    ),
    "selector is null": (
        where("{path: «null}"),
        "where.path: expected a string, got nothing",
        None,
    ),
    "glob": (where('{path: «"a..b"}'), "where.path: path 'a..b' has an empty segment", None),
    "regular expression": (
        where('{path: [a, «"re:a("]}'),
        "missing ), unterminated subpattern at character 2 after 're:'",
        None,
    ),
    "class": (where("{type: «a b}"), "where.type: 'a b' is not the name of a class", None),
    "layers": (where('{layers: «"8-"}'), "where.layers: layers '8-' is neither an index nor", None),
    "layers true": (
        where("{layers: [0, «true]}"),
        "where.layers[1]: expected an index or a slice",
        None,
    ),
    "shape key": (
        where("{shape: {«inn: 3}}"),
        "rule 1 (patch), where.shape: unknown key 'inn'",
        "did you mean 'in'?",
    ),
    "shape key in a list": (
        where("{shape: [{in: 3}, {«inn: 3}]}"),
        "where.shape[1]: unknown key 'inn'",
        "did you mean 'in'?",
    ),
    "shape comparison": (
        where("{shape: {in: «big}}"),
        "where.shape.in: 'big' is not a comparison",
        None,
    ),
    "shape fraction": (
        where("{shape: {in: «1.5}}"),
        "where.shape.in: expected a number or a comp",
        None,
    ),
    "shape null": (
        where("{shape: {in: «null}}"),
        "where.shape.in: expected a number or a comp",
        None,
    ),
    "shape empty": (where("{shape: «{}}"), "where.shape: compares nothing", "name a size"),
    "shape is text": (
        where("{shape: «'256'}"),
        "where.shape: expected a mapping, got the string",
        None,
    ),
    "any is a mapping": (
        where("{any: «{path: a}}"),
        "where.any: expected a list, got a mapping",
        None,
    ),
    "any is empty": (
        where("{any: «[]}"),
        "where.any: the list is empty, so nothing could match",
        None,
    ),
    "inside any": (
        where("{any: [{path: a}, {«rolle: norm}]}"),
        "rule 1 (patch), where.any[1]: unknown key 'rolle'",
        "did you mean 'role'?",
    ),
    "inside not inside any": (
        where("{any: [{not: {any: [{layers: «x}]}}]}"),
        "where.any[0].not.any[0].layers: layers 'x' is neither",
        None,
    ),
    "not is a list": (where("{not: «[a]}"), "where.not: expected a mapping, got a list", None),
    "not is empty": (where("{not: «{}}"), "where.not: selects by nothing", None),
    "not is null": (where("{not: «null}"), "where.not: expected a condition, got nothing", None),
    "inside except": (
        TOP + "  - pass: patch\n    except:\n      role:\n        - norm\n        - «nrom",
        "rule 1 (patch), except.role[1]: unknown role 'nrom'",
        "did you mean 'norm'",
    ),
    "created by itself": (
        TOP + "  - {id: a, pass: patch, where: {created_by: «a}}",
        "rule 'a', where.created_by: 'a' is this rule itself",
        "name an earlier rule",
    ),
    "created by a later rule": (
        TOP + "  - {pass: patch, where: {any: [{created_by: [«patch-2]}]}}\n  - {pass: patch}",
        "rule 1 (patch), where.any[0].created_by[0]: rule 'patch-2' comes later",
        "move it before this one: rules run in order",
    ),
    "created by nobody": (
        TOP + "  - {pass: patch, id: ab}\n  - {pass: patch, except: {not: {created_by: «abc}}}",
        "rule 2 (patch), except.not.created_by: no earlier rule has the id 'abc'",
        "did you mean 'ab'?",
    ),
    "created by, in the first rule": (
        TOP + "  - {pass: patch, where: {created_by: «x}}",
        "no earlier rule has the id 'x'",
        "this is the first rule: none comes before it",
    ),
    # with
    "with is null": (
        TOP + "  - pass: patch\n    «with:",
        "rule 1 (patch), with: nothing follows the key",
        None,
    ),
    "with is a list": (
        options("«[rank]"),
        "rule 'adapters', with: expected a mapping of options of pass patch, got a list",
        None,
    ),
    "unknown option": (
        options("{«rnak: 3}"),
        "rule 'adapters', with: unknown option 'rnak'",
        "did you mean 'rank'?",
    ),
    "int is text": (
        options("{rank: «'16'}"),
        "rule 'adapters', with.rank: expected an integer, got the string '16'",
        "remove the quotes",
    ),
    "int is a word": (
        options("{rank: «many}"),
        "with.rank: expected an integer, got the string 'many'",
        None,
    ),
    "int is a fraction": (
        options("{rank: «16.0}"),
        "with.rank: expected an integer, got the number 16.0",
        None,
    ),
    "int is true": (options("{rank: «true}"), "with.rank: expected an integer, got true", None),
    "int is null": (
        options("{rank: «~}"),
        "with.rank: expected an integer, got nothing",
        "give it a value",
    ),
    "int is a list": (options("{rank: «[1]}"), "with.rank: expected an integer, got a list", None),
    "int of 1.1": (
        options("{rank: «1_000}"),
        "with.rank: expected an integer, got the string '1_000'",
        None,
    ),
    "too small": (options("{rank: «0}"), "with.rank: must be greater than 0, got 0", None),
    "too large": (options("{rank: «5000}"), "with.rank: must be at most 4096, got 5000", None),
    "number is text": (
        options("{alpha: «'1.5'}"),
        "with.alpha: expected a number, got the string '1.5'",
        "remove the quotes",
    ),
    "bool is no": (
        options("{bias: «no}"),
        "with.bias: expected true or false, got the string 'no'",
        None,
    ),
    "string is a number": (
        options("{label: «3}"),
        "with.label: expected a string, got the integer 3",
        "put it into quotes",
    ),
    "choice": (
        options("{method: «lorra}"),
        "with.method: expected 'lora' or 'reflora', got the string 'lorra'",
        "did you mean 'lora'",
    ),
    "choice in a list": (
        options("{slices: [q, «w]}"),
        "with.slices[1]: expected 'q', 'k' or 'v', got the string 'w'",
        None,
    ),
    "list is a word": (
        options("{slices: «q}"),
        "with.slices: expected a list, got the string 'q'",
        None,
    ),
    "empty list of an option": (options("{slices: «[]}"), "with.slices: must not be empty", None),
    "bound of a number": (
        options("{dropout: «1.5}"),
        "with.dropout: must be less than 1, got 1.5",
        None,
    ),
    "union": (
        options("{every: «sometimes}"),
        "with.every: expected an integer or 'auto', got the string 'sometimes'",
        None,
    ),
    "enum": (
        options("{keep: «disk}"),
        "with.keep: expected 'memory' or 'none', got the string 'disk'",
        None,
    ),
    "nested option": (
        options("{window: {start: «x}}"),
        "with.window.start: expected an integer, got the string 'x'",
        None,
    ),
    "unknown nested option": (
        options("{window: {«begin: 0}}"),
        "rule 'adapters', with.window: unknown option 'begin'",
        "known: start, stop",
    ),
    "unknown key in a mapping of anything": (
        options("{notes: {a: {b: 1}}, window: {«begin: 0}}"),
        "unknown option 'begin'",
        "known: start, stop",
    ),
    "unknown key in a mapping of options": (
        options("{windows: {a: {start: 1}, b: {«begin: 0}}}"),
        "rule 'adapters', with.windows.b: unknown option 'begin'",
        "known: start, stop",
    ),
    "mapping of numbers": (
        options("{weights: {a: 1, b: «x}}"),
        "with.weights.b: expected a number, got the string 'x'",
        None,
    ),
    "a validator's ValueError": (
        options(f"{{label: «{'x' * 41}}}"),
        "with.label: a label has at most 40 characters",
        None,
    ),
    "options that do not go together": (
        options("{method: reflora, slices: «[q]}"),
        "rule 'adapters', with.slices: reflora adapts a layer as a whole",
        "leave slices out",
    ),
    "missing option": (
        TOP + "  - {pass: needy, with: «{}}",
        "missing option 'size'",
        None,
    ),
    "missing option, no with": (
        TOP + "  - «pass: needy",
        "missing option 'size'",
        None,
    ),
    "a pass that is not strict is read strictly": (
        TOP + "  - {pass: plain, with: {size: «'3'}}",
        "with.size: expected an integer, got the string '3'",
        None,
    ),
    "a pass that ignores unknown options": (
        TOP + "  - {pass: plain, with: {«sise: 3}}",
        "with: unknown option 'sise'",
        "did you mean 'size'?",
    ),
    "a pass that raises RuleError": (
        TOP + "  - {pass: plain, with: «{size: 13}}",
        "rule 1 (plain), with: size 13 is unlucky",
        "take another",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_file(name: str):
    marked, message, hint = CASES[name]
    before, found, after = marked.partition("«")
    assert found, "the case does not say where"
    with pytest.raises(RuleError) as raised:
        Recipe.loads(before + after, file="rules.yaml")
    error = raised.value
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    assert (error.file, error.line, error.column) == ("rules.yaml", line, column), str(error)
    assert message in error.message
    assert "\n" not in error.message, "more than one problem is reported"
    if hint is not None:
        assert error.hint is not None
        assert hint in error.hint
    assert str(error).startswith(f"rules.yaml:{line}:{column}: ")


def test_all_problems_are_told_in_the_order_of_the_file():
    text = (
        "version: 1\nsede: 0\nrules:\n  - pass: patch\n    with: {rank: '16', rnak: 1}\n"
        "    where: {role: nrom}\n  - pass: ptach\n"
    )
    with pytest.raises(RuleError) as raised:
        Recipe.loads(text, file="r.yaml")
    assert str(raised.value) == (
        "r.yaml:2:1: unknown key 'sede'\n"
        "  hint: did you mean 'seed'?\n"
        "r.yaml:5:18: rule 1 (patch), with.rank: expected an integer, got the string '16'\n"
        "  hint: remove the quotes\n"
        "r.yaml:5:24: rule 1 (patch), with: unknown option 'rnak'\n"
        "  hint: did you mean 'rank'?\n"
        "r.yaml:6:19: rule 1 (patch), where.role: unknown role 'nrom'\n"
        "  hint: did you mean 'norm'?\n"
        "r.yaml:7:11: rule 2 (ptach), pass: unknown pass 'ptach'\n"
        "  hint: did you mean 'patch'?"
    )


def test_a_flood_of_problems_is_cut():
    with pytest.raises(RuleError, match=r"\.\.\. and 180 more$"):
        Recipe.loads(TOP + "  - pass: nothing-like-it\n" * 200)


def test_a_pass_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry.PASSES._builtin, "broken", "surgery.no_such_module:Broken")
    with pytest.raises(RuleError) as raised:
        Recipe.loads(TOP + "  - pass: broken\n    rank: 3\n", file="r.yaml")
    first, _, second = str(raised.value).partition("\nr.yaml:4:5: ")
    assert second.startswith("rule 1 (broken): unknown key 'rank'")
    assert first == (
        "r.yaml:3:11: rule 1 (broken), pass: pass 'broken' (surgery.no_such_module:Broken) cannot "
        "be imported: No module named 'surgery.no_such_module'\n"
        "  hint: install what it needs, or report this to the package it comes from"
    )


def test_a_pass_that_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry.PASSES._builtin, "odd", "surgery.registry:suggest")
    monkeypatch.delitem(registry.PASSES._loaded, "odd", raising=False)
    message = "rule 1 (odd), pass: pass 'odd' (surgery.registry:suggest) is not a dataclass"
    with pytest.raises(RuleError, match=re.escape(message)):
        Recipe.loads(TOP + "  - pass: odd\n")
    registry.PASSES._loaded.pop("odd")


PLAIN_DATA = [
    ({"version": 1, "rules": [{"pass": "patch", "with": {"alpha": float("nan")}}]},
     "rule 1 (patch), with.alpha: every number must be finite, got nan"),
    ({"version": 1, "rules": [{"pass": "patch", "with": {"alpha": object()}}]},
     "with.alpha: expected plain data, got an object of type object"),
    ({"version": 1, "rules": [{"pass": "patch", 3: "x"}]},
     "rule 1 (patch): a key must be a string, got the integer 3"),
    ({"version": 1, "rules": [{"pass": "patch", "where": {"role": ("norm", "nrom")}}]},
     "rule 1 (patch), where.role[1]: unknown role 'nrom'"),
    ({"version": 1, "seed": 10**5000, "rules": []},
     "seed: the integer does not fit into 64 bits"),
    ({"version": 1, "recipe": "\ud800", "rules": []},
     "recipe: half of a surrogate pair is not a character"),
    ([], "a rule file is a mapping with the keys version, recipe, seed, rules; got a list"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), PLAIN_DATA)
def test_wrong_data(data: object, message: str):
    with pytest.raises(RuleError, match=re.escape(message)) as raised:
        Recipe.parse(data)
    assert raised.value.line is None


def test_data_that_contains_itself():
    data: dict[str, object] = {"version": 1}
    data["rules"] = [data]
    with pytest.raises(RuleError, match="nested more than 32 levels deep"):
        Recipe.parse(data)


def test_the_listed_keys_are_the_ones_that_are_read():
    def keys(model: type[RuleDocument | RecipeDocument]) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    assert keys(RecipeDocument) == set(RECIPE_KEYS)
    assert keys(RuleDocument) == set(RULE_KEYS)
    assert {name.rstrip("_") for name in Where.__dataclass_fields__} == set(WHERE_KEYS)
