"""YAML that is not a rule file, with « before the character that the error must point at."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from surgery.errors import RuleError
from surgery.rules import Recipe, yaml
from tests.rules.samples import texts

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 5)
)

CASES: dict[str, tuple[str, str, str | None]] = {
    # name: text, message, hint
    "empty": ("«", "the file is empty", "a rule file starts with 'version: 1'"),
    "only a comment": ("«# nothing\n", "the file is empty", None),
    "tab": (
        "version: 1\nrules:\n«\t- pass: patch\n",
        "a tab cannot indent or separate",
        "use spaces",
    ),
    "two documents": (
        "version: 1\n«---\nversion: 1\n",
        "a second document starts here; a rule file has one",
        "remove '---', or move the document to a file of its own",
    ),
    "document after an end": ("version: 1\n...\n«version: 1\n", "a second document starts", None),
    "doubled key": (
        "version: 1\nseed: 0\n«seed: 1\n",
        "key 'seed' appears twice; the first is in line 2",
        "remove one of them",
    ),
    "doubled key, quoted": (
        '{a: 1, «"a": 2}',
        "key 'a' appears twice; the first is in line 1",
        None,
    ),
    "doubled key, nested": ("a:\n  - {b: 1, c: 2, «b: 1}", "key 'b' appears twice", None),
    "python object": (
        "a: «!!python/object/apply:os.system ['echo pwned']",
        "tags are not allowed, got tag:yaml.org,2002:python/object/apply:os.system",
        "remove it, or quote the text",
    ),
    "harmless tag": ("a: «!!int 3", "tags are not allowed", None),
    "local tag": ("a: «!x 3", "tags are not allowed, got !x", None),
    "tag on a mapping": ("a: «!!set {b}", "tags are not allowed", None),
    "merge key": (
        "a: &x {b: 1}\nc:\n  «<<: *x\n",
        "merge keys ('<<') are not part of YAML 1.2",
        None,
    ),
    "number as key": ("a: {«1: b}", "a key must be a word, got 1", None),
    "null as key": ("«: b", "a key must be a word, got nothing", None),
    "list as key": ("a:\n  ? «[b]\n  : c", "a key must be a word, got a list", None),
    "bare key": ("version: 1\n«rules\n", "no ':' follows this text", "write 'key: value'"),
    "alias without anchor": (
        "path: «*.q_proj",
        "alias '*.q_proj' refers to no anchor '&.q_proj'",
        'text that starts with * must be quoted: "*.q_proj"',
    ),
    "two stars": ("path: «**.q_proj", "alias '**.q_proj' refers", 'must be quoted: "**.q_proj"'),
    "alias inside its anchor": (
        "a: &x [b, «*x]",
        "alias '*x' is inside the value it refers to",
        None,
    ),
    "slice": (
        "layers: -8«:",
        "':' is not allowed here",
        "begin a line for each key; quote text that has special characters",
    ),
    "comparison": ("in: >«=256", "cannot be followed by '='", '">=256"'),
    "comparison in braces": ("{in: «>=256}", "not valid YAML", '">=256"'),
    "open list": ("a: 1\nb: [1,\n  2\n«", "the file ends within brackets", "close them"),
    "open braces": ("a: {b: 1,\n«", "the file ends within brackets", "close them"),
    "open quote": ("a: 1\nb: «'x\n", "the quotes are never closed", "close them"),
    "wrong bracket": (
        "a: [b«}",
        "expected ',' or ']', but got '}', while parsing a list in brackets that starts in line 1",
        None,
    ),
    "braces in a path": (
        "path: {a,b}«.q",
        "not valid YAML: expected the end of the block, but found text, while parsing a mapping",
        None,
    ),
    "indentation": ("a:\n  b: 1\n «c: 2\n", "not valid YAML", None),
    "unknown escape": ('a: "\\«q"', "a backslash in double quotes is an escape", "single quotes"),
    "infinity": ("a: [1, «.inf]", ".inf is not a finite number", "every number must be finite"),
    "minus infinity": ("a: «-.INF", "-.INF is not a finite number", None),
    "not a number": ("a: «.NaN", ".NaN is not a finite number", None),
    "overflow": ("a: «1e999", "the number 1e999 is too large", None),
    "huge integer": ("a: «9223372036854775808", "does not fit into 64 bits", None),
    "very huge integer": (f"a: «{'9' * 5000}", "the integer 9999999999999999999999999...", None),
    "huge hexadecimal": (f"a: «0x{'f' * 5000}", "does not fit into 64 bits", None),
    "surrogate": ('a: «"\\ud800"', "half of a surrogate pair is not a character", None),
    "control character": ("a: b«\x07", "character U+0007 is not allowed in YAML", None),
    "zero byte": ("a: 1\nb: «\x00", "character U+0000 is not allowed in YAML", None),
    "laughs": (
        LAUGHS.replace("a4: &a4 [", "a4: &a4 [«"),
        "the file has more than 10000 values once its aliases are written out",
        None,
    ),
    "many values": ("[" + "x, " * 9999 + "«x]", "the file has more than 10000 values", None),
    "deep": ("[" * 32 + "«[" + "]" * 33, "nested more than 32 levels deep", None),
    "deep and open": ("[" * 32 + "«" + "[" * 100_000, "nested more than 32 levels deep", None),
    "large": ("«" + "a: b\n" * 60_000, "the text has more than 262144 bytes", None),
    "old yaml": (
        "# x\n\n«%YAML 1.1\n---\na: yes\n",
        "directives are not allowed, got %YAML 1.1",
        "remove the line; rule files are YAML 1.2",
    ),
    "no such yaml": ("«%YAML 1.3\n---\na: 1\n", "directives are not allowed", None),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_yaml(name: str):
    marked, message, hint = CASES[name]
    before, found, after = marked.partition("«")
    assert found, "the case does not say where"
    with pytest.raises(RuleError) as raised:
        Recipe.loads(before + after, file="rules.yaml")
    error = raised.value
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    assert (error.file, error.line, error.column) == ("rules.yaml", line, column), str(error)
    assert message in error.message
    if hint is not None:
        assert error.hint is not None
        assert hint in error.hint


def test_laughs_cost_no_time():
    started = time.perf_counter()
    with pytest.raises(RuleError):
        yaml.load(LAUGHS, "laughs")
    assert time.perf_counter() - started < 5  # written out, the file has 9 to the 5th values


BYTES = [
    (b"version: 1\nrecipe: caf\xe9\n", 2, 12, "byte 0xe9 is not UTF-8"),
    ("version: 1\nrecipe: é".encode() + b"\xff", 2, 10, "byte 0xff is not UTF-8"),
    ("version: 1\n".encode("utf-16"), 1, 1, "byte 0xff is not UTF-8"),
    (b"a" * (yaml.MAX_BYTES + 1), 1, 1, "the file has more than 262144 bytes"),
    (b"", 1, 1, "the file is empty"),
]


@pytest.mark.parametrize(("content", "line", "column", "message"), BYTES)
def test_wrong_bytes(tmp_path: Path, content: bytes, line: int, column: int, message: str):
    path = tmp_path / "rules.yaml"
    path.write_bytes(content)
    with pytest.raises(RuleError, match=message) as raised:
        Recipe.load(path)
    assert (raised.value.file, raised.value.line, raised.value.column) == (str(path), line, column)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path):
    path = tmp_path / "rules.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\r\nrules:\r\n  - pass: patch\r\n")
    assert Recipe.load(path).rules[0].id == "patch"


SCALARS = [
    ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"),
    ("true", True), ("True", True), ("FALSE", False), ("tRue", "tRue"),
    ("null", None), ("~", None), ("Null", None), ("", None), ("nil", "nil"),
    ("1", 1), ("-1", -1), ("+1", 1), ("007", 7), ("0o17", 15), ("0x1F", 31), ("0b1", "0b1"),
    ("1_000", "1_000"), ("12:30", "12:30"), ("2026-11-21", "2026-11-21"), ("1.2.3", "1.2.3"),
    ("1.", 1.0), (".5", 0.5), ("1e-4", 1e-4), ("1E5", 1e5), ("-1.5e+3", -1500.0), ("1e", "1e"),
    ('"1"', "1"), ("'true'", "true"), ("'it''s'", "it's"), ('"\\u00e9"', "é"), ("a b", "a b"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), SCALARS)
def test_scalar(text: str, expected: object):
    data: Any = yaml.load(f"a: {text}\n", "scalars")[0]
    assert data == {"a": expected}
    assert type(data["a"]) is type(expected)


def test_an_alias_is_a_copy_that_knows_where_it_was_written():
    data: Any = yaml.load("a: &x {b: [1]}\nc: *x\n", "aliases")[0]
    data["c"]["b"].append(2)
    assert data == {"a": {"b": [1]}, "c": {"b": [1, 2]}}
    assert yaml.locate(data, ("c", "b", 0)) == (1, 12)


def test_places():
    data, start = yaml.load("# x\na:\n  b: [1, {c: 2}]\n", "places")
    assert start == (2, 1)
    assert yaml.locate(data, ()) == (2, 1)
    assert yaml.locate(data, ("a", "b", 1, "c")) == (3, 14)
    assert yaml.locate(data, ("a", "b", 1, "c"), key=True) == (3, 11)
    assert yaml.locate(data, ("a", "b"), key=True) == (3, 3)
    assert yaml.locate(data, ("a", "b", 1, "missing", "deeper")) == (3, 10)
    assert yaml.locate({"a": 1}, ("a",)) is None


_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.sampled_from(
        ["yes", "0o7", "1_0", "1e5", "-", "?", "a: b", "a #b", "...", "---", "0x1", "<<"]
    )
)
_data = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
)
_documents = st.dictionaries(texts, _data, min_size=1, max_size=4)


@given(_documents)
def test_what_is_written_is_read_back(data: dict[str, Any]):
    text = yaml.dump(data)
    assert _typed(yaml.load(text, "dumped")[0]) == _typed(data)


@given(_documents)
def test_another_reader_reads_the_same(data: dict[str, Any]):
    reader: Any = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = False
    assert _typed(reader.load(yaml.dump(data))) == _typed(data)


@given(_documents, st.sampled_from([None, 2]))
def test_json_is_read(data: dict[str, Any], indent: int | None):
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    printable = not any(character in text for character in "\x7f\ufeff\ufffe\uffff")
    if printable and not any("\x80" <= character <= "\x9f" for character in text):
        assert _typed(yaml.load(text, "json")[0]) == _typed(data)


def _typed(data: Any) -> Any:
    """Data that compares unequal where a type differs, such as 1 and 1.0."""
    if isinstance(data, dict):
        return {key: _typed(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_typed(value) for value in data]
    return type(data).__name__, data


_lines = ["version: 1\n", "rules:\n", "  - pass: patch\n", "    with: ", "{rank: 3}", "where", "\n"]
_signs = [*"[]{},'#!%-:?|>*& \"\\\t\r", ": ", "- ", "? ", "&a ", "*a", "|\n", "---\n", "...\n"]
_others = ["null", "1", "é", "\u2028", "\x85", "\ufeff", "re:("]
_fragments = st.sampled_from(_lines) | st.sampled_from(_signs) | st.sampled_from(_others)


def _read(text: str) -> Recipe | RuleError:
    try:
        return Recipe.loads(text, file="any.yaml")
    except RuleError as error:
        return error


@given(st.lists(_fragments | texts, max_size=25).map("".join))
def test_any_text_is_a_recipe_or_an_error_with_a_place(text: str):
    found = _read(text)
    if isinstance(found, Recipe):
        assert Recipe.loads(found.to_yaml()) == found
        return
    assert found.file == "any.yaml"
    assert (found.line or 0) >= 1
    assert (found.column or 0) >= 1
