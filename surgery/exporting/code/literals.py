"""Values and names as text of a Python file; what is neither is refused."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from surgery.errors import ExportError


def literal(value: object) -> str:
    """A value as a Python literal.

    Raises:
        ExportError: it is none.
    """
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise ExportError(f"{text[:80]} cannot be written into a Python file")
    return text


def identifier(name: str) -> str:
    """A name that may stand in code.

    Raises:
        ExportError: it may not.
    """
    if not name.isidentifier() or not name.isascii():
        raise ExportError(f"{name!r} is no name that can be written into a Python file")
    return name


def calls(parts: Iterable[tuple[str, object]]) -> str:
    """Keyword arguments of a call, as text."""
    return ", ".join(f"{identifier(name)}={literal(value)}" for name, value in parts)
