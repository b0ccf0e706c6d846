"""The public API against its snapshot, names and signatures.

A change to the snapshot is a change that users see: write it into the changelog, then run
``make api`` to accept it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import surgery

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def test_public_api_is_the_snapshot():
    assert public_api() == SNAPSHOT.read_text(encoding="utf-8"), "see the top of this file"


def test_every_public_name_is_documented():
    undocumented = [name for name in surgery.__all__ if not inspect.getdoc(getattr(surgery, name))]
    assert not undocumented


def public_api() -> str:
    lines = [line for name in sorted(surgery.__all__) for line in described(name)]
    return "\n".join(lines) + "\n"


def described(name: str) -> Iterator[str]:
    found = getattr(surgery, name)
    if isinstance(found, ModuleType):
        yield f"{name} (module)"
        yield from (
            f"    {line}"
            for each in sorted(found.__all__)
            for line in one(each, getattr(found, each))
        )
        return
    yield from one(name, found)


def one(name: str, found: Any) -> Iterator[str]:
    if not inspect.isclass(found):
        yield f"{name}{inspect.signature(found)}" if callable(found) else f"{name}: {found!r}"
        return
    yield f"class {name}{signature(found)}({', '.join(base.__name__ for base in found.__bases__)})"
    for member in sorted(members(found)):
        value = inspect.getattr_static(found, member)
        if isinstance(value, (classmethod, staticmethod)):
            yield f"    {type(value).__name__} {member}{inspect.signature(getattr(found, member))}"
        elif inspect.isfunction(value):
            yield f"    {member}{inspect.signature(value)}"
        elif isinstance(value, str | int):
            yield f"    {member} = {value!r}"
        else:
            yield f"    {member}"


def members(cls: type) -> set[str]:
    """Public attributes that this project gives a class, inherited ones included."""
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in PACKAGES]
    named = {
        name for base in ours for name in (*vars(base), *vars(base).get("__annotations__", {}))
    }
    return {name for name in named if not name.startswith("_") and hasattr_static(cls, name)}


def hasattr_static(cls: type, name: str) -> bool:
    return any(name in vars(base) for base in cls.__mro__)


def signature(cls: type) -> str:
    """How a class is called; nothing where it takes over its base's constructor from C."""
    try:
        return str(inspect.signature(cls))
    except ValueError:
        return ""


PACKAGES = {"surgery", "architectures"}

if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
    sys.stdout.write(f"wrote {SNAPSHOT}\n")
