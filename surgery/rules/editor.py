"""The JSON schema of rule files, for editors to complete and check against."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from surgery.registry import PASSES
from surgery.rules import migrate
from surgery.rules.document import pass_class
from surgery.rules.match import SHAPE_KEYS
from surgery.rules.roles import GROUPS, ROLES

Schema = dict[str, Any]


def json_schema() -> Schema:
    """JSON schema (2020-12) of rule files, with the options of every registered pass.

    The yaml-language-server uses it when a rule file starts with
    ``# yaml-language-server: $schema=rules.schema.json``.

    Raises:
        RuleError: a registered pass cannot be imported.
    """
    shared: Schema = {
        "where": _where(),
        "shape": _shape(),
        "role": _role(),
        "comparison": _comparison(),
    }
    passes = {name: _options(name, shared) for name in PASSES.names()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Rule file of model-surgery",
        "description": "Rules that rewrite the architecture of a model, carried out in order.",
        "type": "object",
        "additionalProperties": False,
        "required": ["version", "rules"],
        "properties": {
            "version": {
                "const": migrate.VERSION,
                "description": "Version of the rule language.",
            },
            "recipe": {"type": "string", "minLength": 1, "description": "A name for messages."},
            "seed": {
                "type": "integer",
                "minimum": 0,
                "exclusiveMaximum": 2**63,
                "default": 0,
                "description": "What new parameters are drawn from.",
            },
            "rules": {"type": "array", "minItems": 1, "items": _rule(passes)},
        },
        "$defs": shared,
    }


def _rule(passes: Mapping[str, Schema]) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["pass"],
        "properties": {
            "id": {
                "type": "string",
                "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
                "description": "Name for messages, the edit log and created_by.",
            },
            "pass": {"enum": sorted(passes), "description": "What to do to the sites."},
            "where": {
                "$ref": "#/$defs/where",
                "description": "Sites the rule is for. Left out: all that the pass accepts.",
            },
            "except": {
                "$ref": "#/$defs/where",
                "description": "Sites the rule is not for, even if 'where' holds.",
            },
            "with": {"type": "object", "description": "Options of the pass."},
            "optional": {
                "type": "boolean",
                "default": False,
                "description": "Whether the rule may match nothing.",
            },
        },
        "allOf": [_for_pass(name, options) for name, options in sorted(passes.items())],
    }


def _for_pass(name: str, options: Schema) -> Schema:
    then: Schema = {"properties": {"with": options}}
    if options.get("required"):
        then["required"] = ["with"]
    used = {"properties": {"pass": {"const": name}}, "required": ["pass"]}
    return {"if": used, "then": then}


def _options(name: str, shared: Schema) -> Schema:
    """Schema of a pass's options; what it refers to is added to ``shared`` under its name."""
    cls = pass_class(name)
    prefix = f"{name}."
    schema = TypeAdapter(cls).json_schema(by_alias=False, ref_template=f"#/$defs/{prefix}{{model}}")
    for key, value in schema.pop("$defs", {}).items():
        shared[f"{prefix}{key}"] = value
    documentation = inspect.getdoc(cls) or name
    arguments = _arguments(documentation)
    for key, value in schema.get("properties", {}).items():
        if key in arguments:
            value.setdefault("description", arguments[key])
    schema["description"] = documentation.partition("\n\nArgs:")[0]
    schema["additionalProperties"] = False
    return schema


def _arguments(documentation: str) -> dict[str, str]:
    """Argument → what the ``Args:`` section of a docstring says about it."""
    section = re.search(r"^Args:\n((?:(?: .*)?\n?)*)", documentation, re.MULTILINE)
    text = section[1] if section else ""
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {name: " ".join(described.split()) for name, described in entries}


def _where() -> Schema:
    text: Schema = {"type": "string", "minLength": 1}
    layer: Schema = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[-0-9:]+$"}]}
    inner: Schema = {"$ref": "#/$defs/where"}
    return {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "properties": {
            "path": _several(text, "Dotted path: a glob (*, **, ?, [0-3], {a,b}) or re:REGEX."),
            "type": _several(text, "Name of the module's class or of a base, such as Linear."),
            "role": _several({"$ref": "#/$defs/role"}, "Role in the model's structure."),
            "layers": _several(layer, 'Slice or index over the stack: "-8:", "::2", 3.'),
            "shape": _several({"$ref": "#/$defs/shape"}, "Comparisons with the weight's sizes."),
            "stack": _several(text, "all, largest, or a path pattern."),
            "created_by": _several(text, "Id of an earlier rule that made the site."),
            "any": {
                "type": "array",
                "minItems": 1,
                "items": inner,
                "description": "One of these must hold.",
            },
            "not": {**inner, "description": "This must not hold."},
        },
    }


def _several(item: Schema, description: str) -> Schema:
    several: Schema = {"type": "array", "minItems": 1, "items": item}
    return {"anyOf": [item, several], "description": description}


def _role() -> Schema:
    known = {**GROUPS, **ROLES}
    return {"anyOf": [{"const": name, "description": text} for name, text in known.items()]}


def _shape() -> Schema:
    comparison: Schema = {"$ref": "#/$defs/comparison"}
    return {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "properties": dict.fromkeys(SHAPE_KEYS, comparison),
    }


def _comparison() -> Schema:
    term = "(==|!=|>=|<=|>|<)? *[0-9]+"
    return {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": f"^ *{term} *(, *{term} *)*$"},
        ],
        "description": 'A number, or comparisons such as ">=256, <1024".',
    }
