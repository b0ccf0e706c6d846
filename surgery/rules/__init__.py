"""Rules: what a rule file can say, how it is read, and what each selector means.

``match`` and ``roles`` are light; everything that needs pydantic or a YAML parser is imported
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.rules.editor import json_schema as json_schema
    from surgery.rules.schema import Recipe as Recipe
    from surgery.rules.schema import Rule as Rule
    from surgery.rules.strict import invalid as invalid
    from surgery.rules.strict import options as options
    from surgery.rules.where import CreatedBy as CreatedBy
    from surgery.rules.where import Layers as Layers
    from surgery.rules.where import Path as Path
    from surgery.rules.where import Role as Role
    from surgery.rules.where import Shape as Shape
    from surgery.rules.where import Sizes as Sizes
    from surgery.rules.where import Stack as Stack
    from surgery.rules.where import Type as Type
    from surgery.rules.where import Where as Where

__all__ = [
    "CreatedBy",
    "Layers",
    "Path",
    "Recipe",
    "Role",
    "Rule",
    "Shape",
    "Sizes",
    "Stack",
    "Type",
    "Where",
    "invalid",
    "json_schema",
    "options",
]

_HOME = {
    "CreatedBy": "where",
    "Layers": "where",
    "Path": "where",
    "Recipe": "schema",
    "Role": "where",
    "Rule": "schema",
    "Shape": "where",
    "Sizes": "where",
    "Stack": "where",
    "Type": "where",
    "Where": "where",
    "invalid": "strict",
    "json_schema": "editor",
    "options": "strict",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
