"""The shape of a rule file: what it is checked against before anything is built from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import InitErrorDetails

from surgery.errors import RuleError
from surgery.registry import PASSES, suggest
from surgery.rules import migrate
from surgery.rules.explain import Invalid, Problem, describe, explain, shorten
from surgery.rules.match import SHAPE_KEYS
from surgery.rules.strict import invalid, option_names, problem_error
from surgery.rules.where import Where
from surgery.rules.yaml import MAX_DEPTH, Loc, child

RECIPE_KEYS = ("version", "recipe", "seed", "rules")
RULE_KEYS = ("id", "pass", "where", "except", "with", "optional")
WHERE_KEYS = ("path", "type", "role", "layers", "shape", "stack", "created_by", "any", "not")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_id(text: str) -> str:
    """Return ``text`` if it can be the id of a rule; raises for pydantic if it cannot."""
    if _ID.fullmatch(text) is None:
        raise invalid(
            f"{shorten(text)!r} cannot be an id",
            hint="an id has 1 to 64 letters, digits, '-', '_' or '.', and starts with a letter "
            "or a digit",
        )
    return text


def pass_class(name: str) -> type:
    """The class registered as a pass.

    Raises:
        RuleError: there is none, it cannot be imported, or it is not a dataclass of options.
    """
    try:
        found: object = PASSES.get(name)
    except (ImportError, AttributeError) as error:
        raise RuleError(
            f"pass {name!r} ({PASSES.origin(name)}) cannot be imported: {error}",
            hint="install what it needs, or report this to the package it comes from",
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise RuleError(f"pass {name!r} ({PASSES.origin(name)}) is not a dataclass of options")
    return found


def _check_pass(name: str) -> str:
    try:
        pass_class(name)
    except RuleError as error:
        raise problem_error(Problem((), error.message, error.hint)) from error
    return name


def _not_null(value: object) -> object:
    if value is None:
        raise invalid("nothing follows the key", hint="indent what belongs to it, or remove it")
    return value


_Given = BeforeValidator(_not_null)
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class RuleDocument(BaseModel):
    """One item of ``rules``."""

    model_config = _STRICT

    id: Annotated[str, AfterValidator(check_id)] = ""
    pass_: Annotated[str, AfterValidator(_check_pass)] = Field(alias="pass")
    where: Annotated[Where | None, _Given] = None
    except_: Annotated[Where | None, _Given] = Field(default=None, alias="except")
    with_: Annotated[Any, _Given] = Field(
        default_factory=dict[str, Any], alias="with", validate_default=True
    )
    optional: bool = False

    @field_validator("with_")
    @classmethod
    def _build_options(cls, value: object, info: ValidationInfo) -> object:
        """The pass itself, built from its options. Skipped where there is no such pass."""
        name = info.data.get("pass_")
        return None if name is None else build_options(name, value)


def _not_empty(rules: tuple[RuleDocument, ...]) -> tuple[RuleDocument, ...]:
    if not rules:
        raise invalid("the list is empty; a recipe has at least one rule")
    return rules


class RecipeDocument(BaseModel):
    """A rule file."""

    model_config = _STRICT

    version: int
    recipe: Annotated[str, Field(min_length=1)] = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rules: Annotated[tuple[RuleDocument, ...], AfterValidator(_not_empty)]


def migrated(data: object) -> dict[str, Any]:
    """The document in the current version of the language.

    Raises:
        Invalid: it is not a mapping of plain data, or its version is not supported.
    """
    if not isinstance(data, dict):
        keys = ", ".join(RECIPE_KEYS)
        raise Invalid(
            Problem((), f"a rule file is a mapping with the keys {keys}; got {describe(data)}")
        )
    if problem := next(_implausible(cast("object", data), ()), None):
        raise Invalid(problem)
    return migrate.migrate(cast("dict[str, Any]", data))


def read(data: dict[str, Any]) -> RecipeDocument:
    """What a document of the current version says.

    Raises:
        Invalid: something is wrong with it.
    """
    try:
        # As JSON, a list may become a tuple and text an enum; nothing else changes its type.
        return RecipeDocument.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = explain(error, data, functools.partial(_hint, data))
    raise Invalid(*problems)


def _implausible(data: object, loc: Loc) -> Iterator[Problem]:
    """What plain data cannot contain. A file's cannot; data built in Python can."""
    if len(loc) > MAX_DEPTH:
        yield Problem(loc, f"nested more than {MAX_DEPTH} levels deep")
    elif isinstance(data, Mapping):
        for key, value in cast("Mapping[object, object]", data).items():
            if not isinstance(key, str):
                yield Problem(loc, f"a key must be a string, got {describe(key)}")
            else:
                yield from _implausible(value, (*loc, key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(cast("list[object]", data)):
            yield from _implausible(value, (*loc, index))
    elif problem := _implausible_scalar(data):
        yield Problem(loc, problem)


def _implausible_scalar(data: object) -> str | None:
    if isinstance(data, float) and not math.isfinite(data):
        return f"every number must be finite, got {data}"
    if isinstance(data, int) and not -(2**63) <= data < 2**63:
        return "the integer does not fit into 64 bits"
    if isinstance(data, str) and any("\ud800" <= character <= "\udfff" for character in data):
        return "half of a surrogate pair is not a character"
    if not isinstance(data, str | int | float | None):
        return f"expected plain data, got {describe(data)}"
    return None


def build_options(name: str, value: object) -> object:
    """A pass built from the ``with`` of a rule.

    Raises:
        ValidationError: an option is unknown, missing or wrong.
    """
    if not isinstance(value, dict):
        raise problem_error(_not_options(name, value))
    given = cast("dict[str, Any]", value)
    cls = pass_class(name)
    names = option_names(cls)
    problems = [
        Problem((key,), f"unknown option {key!r}", suggest(key, names), at_key=True)
        for key in given
        if key not in names
    ]
    known = {key: option for key, option in given.items() if key in names}
    try:
        built = _adapter(cls).validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        problems += explain(error, known, functools.partial(_option_hint, cls), "option")
    except RuleError as error:
        problems.append(Problem((), error.message, error.hint))
    else:
        if not problems:
            return built
    lines = [
        InitErrorDetails(type=problem_error(problem), loc=(), input=given) for problem in problems
    ]
    raise ValidationError.from_exception_data(name, lines)


def _option_hint(cls: type, loc: Loc, key: str) -> str:
    return suggest(key, _keys_at(_adapter(cls).json_schema(by_alias=False), loc))


def _keys_at(schema: dict[str, Any], loc: Loc) -> set[str]:
    """Keys that a JSON schema allows in the mapping at ``loc``."""
    nodes = list(_branches(schema, schema))
    for step in loc:
        below = [_below(node, step) for node in nodes]
        nodes = [branch for node in below for branch in _branches(node, schema)]
    return {key for node in nodes for key in node.get("properties", {})}


def _below(node: dict[str, Any], step: str | int) -> dict[str, Any]:
    if isinstance(step, int):
        return node.get("items", {})
    if step in node.get("properties", {}):
        return node["properties"][step]
    others = node.get("additionalProperties")
    return cast("dict[str, Any]", others) if isinstance(others, dict) else {}


def _branches(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a node, with references followed."""
    if "$ref" in node:
        yield from _branches(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    for branch in node.get("anyOf", node.get("oneOf", ())):
        yield from _branches(branch, schema)
    yield node


def _not_options(name: str, value: object) -> Problem:
    return Problem((), f"expected a mapping of options of pass {name}, got {describe(value)}")


@functools.lru_cache(maxsize=256)
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def dump_options(built: object) -> dict[str, Any]:
    """The options of a pass as JSON-able data."""
    return cast("dict[str, Any]", _adapter(type(built)).dump_python(built, mode="json"))


def _hint(document: object, loc: Loc, key: str) -> str:
    """What to do about a key that the mapping at ``loc`` does not know."""
    if not loc:
        return _elsewhere(key, "recipe") or suggest(key, RECIPE_KEYS)
    if len(loc) == 2:
        used = child(child(child(document, "rules"), loc[1]), "pass")
        options = _options_of(used) if isinstance(used, str) else []
        return _elsewhere(key, "rule", options) or suggest(key, RULE_KEYS)
    if "shape" in loc[-2:]:
        return suggest(key, SHAPE_KEYS)
    return suggest(key, WHERE_KEYS)


def _elsewhere(key: str, level: str, options: list[str] | None = None) -> str | None:
    """Where a key belongs that stands one level too high."""
    if level == "recipe" and key in RULE_KEYS:
        return f"{key!r} belongs to a rule: put it into an item of 'rules'"
    if key in (options or []):
        return f"options of the pass go under 'with': with: {{{key}: ...}}"
    if level == "rule" and key in WHERE_KEYS:
        return f"selectors go under 'where': where: {{{key}: ...}}"
    return None


def _options_of(name: str) -> list[str]:
    try:
        return option_names(pass_class(name))
    except RuleError:  # what is wrong with the pass is told at the key 'pass'
        return []
