"""Reads a training configuration: YAML with lines, overrides, sentences for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from surgery.errors import ConfigError, RuleError
from surgery.registry import suggest
from surgery.rules import Recipe, yaml
from surgery.rules.explain import Problem, describe, dotted, explain, within
from surgery.rules.yaml import Loc, Mark, child, locate
from surgery.shipped import file_or_shipped
from surgery.train.config import Configuration

C = TypeVar("C", bound=Configuration)


@dataclass(frozen=True)
class Override:
    """One ``KEY=VALUE``: where it goes, what goes there, and how it was written."""

    loc: Loc
    value: object
    text: str


def load(kind: type[C], given: str | Path, overrides: Sequence[str]) -> C:
    """Read a configuration file; see ``Configuration.load``."""
    known = kind.shipped()
    path = file_or_shipped(given, known)
    if path is None:
        raise ConfigError(
            f"{str(given)!r} is no file and no shipped configuration",
            hint=suggest(str(given), known),
        )
    try:
        content = yaml.read(path, "configuration file", "YAML files", ConfigError)
        data, start = yaml.load(yaml.decode(content, str(path)), str(path))
    except RuleError as error:
        raised = _as_config_error(error)
    else:
        changes = [_override(text) for text in overrides]
        return _build(kind, data, changes, path, start)
    raise raised


def parse(kind: type[C], data: Mapping[str, Any]) -> C:
    """Build a configuration from plain data; see ``Configuration.parse``."""
    return _build(kind, dict(data), [], None, None)


def _build(
    kind: type[C],
    data: object,
    changes: Sequence[Override],
    path: Path | None,
    start: Mark | None,
) -> C:
    file = None if path is None else str(path)
    if not isinstance(data, dict):
        keys = ", ".join(kind.model_fields)
        raise ConfigError(
            f"a configuration is a mapping with the keys {keys}; got {describe(data)}",
            file=file,
            line=None if start is None else start.line,
            column=None if start is None else start.column,
        )
    document = cast("dict[str, Any]", data)
    for change in changes:
        _put(document, change)
    _inline_rules(document, changes, path)
    try:
        # As JSON, a list may become a tuple; nothing else changes its type.
        return kind.model_validate_json(_as_json(document))
    except ValidationError as error:
        problems = explain(error, document, partial(_hint, kind, document))
    raise _told(problems, document, changes, file, start)


def _as_json(document: Mapping[str, Any]) -> str:
    try:
        return json.dumps(document)
    except TypeError as error:
        raise ConfigError(f"a configuration is plain data: {error}") from None


#: What an override may say for short.
_SHORT: dict[tuple[str, ...], tuple[str, ...]] = {("train", "lr"): ("optim", "lr")}


def _override(text: str) -> Override:
    key, equals, value = text.partition("=")
    steps = tuple(key.strip().split("."))
    steps = _SHORT.get(steps, steps)
    if not equals or not all(steps):
        raise ConfigError(
            f"override {text!r}: expected KEY=VALUE with a dotted key",
            hint="as in train.steps=100",
        )
    if not value.strip():
        return Override(steps, None, text)
    try:
        read, _ = yaml.load(value, f"override {text!r}")
    except RuleError as error:
        raise ConfigError(f"override {text!r}: {error.message}", hint=error.hint) from None
    return Override(steps, _plain(read), text)


def _plain(value: object) -> object:
    """Without the marks of the override's own text, which is no line of the file."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, object]", value).items()}
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[object]", value)]
    return value


def _put(document: dict[str, Any], change: Override) -> None:
    place: dict[str, Any] = document
    for depth, step in enumerate(change.loc[:-1]):
        inner: object = place.setdefault(str(step), {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {change.text!r}: {dotted(change.loc[: depth + 1])} is "
                f"{describe(inner)}, not a section",
            )
        place = cast("dict[str, Any]", inner)
    place[str(change.loc[-1])] = change.value


def _inline_rules(document: dict[str, Any], changes: Sequence[Override], path: Path | None) -> None:
    """Replace the path of a rule file by its content, so that a run's configuration is whole."""
    named: object = document.get("rules")
    if not isinstance(named, str):
        return
    # A path on the command line starts where the command runs, one in a file beside that file.
    typed = any(change.loc == ("rules",) for change in changes)
    folder = Path() if typed or path is None else path.parent
    try:
        document["rules"] = Recipe.load(folder / named).dump()
    except RuleError as error:
        raised = _as_config_error(error)
    else:
        return
    raise raised


def _told(
    problems: Sequence[Problem],
    document: Mapping[str, Any],
    changes: Sequence[Override],
    file: str | None,
    start: Mark | None,
) -> ConfigError:
    errors = [_error(problem, document, changes, file, start) for problem in problems]
    errors.sort(key=lambda error: (error.line or 0, error.column or 0))
    first, rest = errors[0], errors[1:]
    if not rest:
        return first
    hint = "" if first.hint is None else f"\n  hint: {first.hint}"
    message = "\n".join([f"{first.message}{hint}", *(str(error) for error in rest)])
    return ConfigError(message, file=first.file, line=first.line, column=first.column)


def _error(
    problem: Problem,
    document: Mapping[str, Any],
    changes: Sequence[Override],
    file: str | None,
    start: Mark | None,
) -> ConfigError:
    where = dotted(within(problem.loc[:-1] if problem.at_key else problem.loc, document))
    message = f"{where}: {problem.message}" if where else problem.message
    change = next((c for c in changes if problem.loc[: len(c.loc)] == c.loc), None)
    if change is not None:
        return ConfigError(f"override {change.text!r}: {message}", hint=problem.hint)
    if start is None:
        return ConfigError(message, hint=problem.hint, file=file)
    line, column = locate(document, problem.loc, key=problem.at_key) or start
    return ConfigError(message, hint=problem.hint, file=file, line=line, column=column)


def _hint(kind: type[Configuration], document: object, loc: Loc, key: str) -> str:
    """What to do about an unknown key: the nearest one here, or the section it belongs to."""
    schema = kind.model_json_schema()
    known = list(dict.fromkeys(_keys(schema, schema, document, ())))
    here = suggest(key, (str(name[-1]) for name in known if name[:-1] == loc))
    elsewhere = [dotted(name) for name in known if name[-1] == key]
    if here.startswith("did you mean") or not elsewhere:
        return here
    return f"did you mean {' or '.join(map(repr, elsewhere))}?"


def _keys(
    node: Mapping[str, Any],
    schema: Mapping[str, Any],
    given: object,
    loc: Loc,
    inside: frozenset[str] = frozenset(),
) -> Iterator[Loc]:
    """Every key that the schema knows, with the way to it; of several kinds, of the one given.

    What contains itself, as conditions do, is followed as deep as it is given.
    """
    for branch in _branches(node, given):
        yield from _keys(branch, schema, given, loc, inside)
    named = node.get("$ref", "").rpartition("/")[2]
    if named and (named not in inside or _is_mapping(given)):
        yield from _keys(schema["$defs"][named], schema, given, loc, inside | {named})
    for key, inner in node.get("properties", {}).items():
        yield (*loc, key)
        yield from _keys(inner, schema, child(given, key), (*loc, key), inside)


def _is_mapping(given: object) -> bool:
    return isinstance(given, Mapping)


def _branches(node: Mapping[str, Any], given: object) -> list[Mapping[str, Any]]:
    if "discriminator" not in node:
        return [*node.get("anyOf", ())]
    rule = node["discriminator"]
    chosen = rule["mapping"].get(child(given, rule["propertyName"]))
    return [] if chosen is None else [{"$ref": chosen}]


def _as_config_error(error: RuleError) -> ConfigError:
    return ConfigError(
        error.message, hint=error.hint, file=error.file, line=error.line, column=error.column
    )
