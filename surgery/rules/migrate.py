"""Versions of the rule language, and the steps from an old one to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.rules.explain import Invalid, Problem, describe

VERSION = 1
"""The version this release reads and writes."""

Step = Callable[[dict[str, Any]], dict[str, Any]]

STEPS: dict[int, Step] = {}
"""Version → what turns a document of that version into one of the next.

A step changes mappings in place where it can: they remember the lines they came from.
"""


def supported() -> range:
    """The versions that can be read."""
    oldest = VERSION
    while oldest - 1 in STEPS:
        oldest -= 1
    return range(oldest, VERSION + 1)


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """The document in the current version of the language.

    Raises:
        Invalid: it has no version, or one that is not supported.
    """
    if "version" not in data:
        raise Invalid(
            Problem((), "missing key 'version'", f"start the file with 'version: {VERSION}'")
        )
    found = data["version"]
    if problem := check(found):
        raise Invalid(problem)
    for version in range(found, VERSION):
        data = STEPS[version](data)
        data["version"] = version + 1
    return data


def check(version: object) -> Problem | None:
    """What is wrong with a version, if anything."""
    known = supported()
    if isinstance(version, bool) or not isinstance(version, int):
        message = f"expected an integer, got {describe(version)}"
        return Problem(("version",), message, f"write 'version: {VERSION}'")
    if version in known:
        return None
    readable = str(VERSION) if len(known) == 1 else f"{known[0]} to {VERSION}"
    message = f"{version} is not a supported version; this release reads {readable}"
    newer = version > VERSION
    return Problem(
        ("version",),
        message,
        "upgrade model-surgery" if newer else f"write the rules for version {VERSION}",
    )
