"""The registered adapter methods and mirror maps with their options, as rules name them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import pydantic.dataclasses
from pydantic import ConfigDict

from architectures.adapters import Method
from architectures.mirror import MirrorMap
from surgery.registry import ADAPTERS, MIRRORS, suggest
from surgery.rules import invalid
from surgery.rules.explain import Problem
from surgery.rules.strict import option_names, problem_error


def method_named(name: str) -> type[Method]:
    """The class of a registered method.

    Raises:
        RuleError: there is none.
    """
    return cast("type[Method]", ADAPTERS.get(name))


def known_method(name: str) -> str:
    """Return the name of a method if there is one; raises for pydantic if there is not."""
    if name not in ADAPTERS.names():
        raise invalid(f"unknown method {name!r}", hint=suggest(name, ADAPTERS.names()))
    return name


def completed_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method, those that were not given at their defaults."""
    return completed("method", method, method_named(method).Options, given)


def map_named(name: str) -> type[MirrorMap]:
    """The class of a registered mirror map.

    Raises:
        RuleError: there is none.
    """
    return cast("type[MirrorMap]", MIRRORS.get(name))


def known_map(name: str) -> str:
    """Return the name of a mirror map if there is one; raises for pydantic if there is not."""
    if name not in MIRRORS.names():
        raise invalid(f"unknown map {name!r}", hint=suggest(name, MIRRORS.names()))
    return name


def completed(what: str, name: str, known: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain data, those that were not given at their defaults.

    Args:
        what: What has the options, for messages: ``method`` or ``map``.
        name: Its name.
        known: The dataclass of its options.
        given: What a rule says, lists for tuples.
    """
    names = option_names(known)
    unknown = [key for key in given if key not in names]
    if unknown:
        hint = suggest(unknown[0], names) if names else f"{what} {name!r} has no options"
        message = f"{what} {name!r} has no option {unknown[0]!r}"
        raise problem_error(Problem((unknown[0],), message, hint, at_key=True))
    made = dataclasses.asdict(_checked(known)(**tupled(given)))
    return {key: _listed(value) for key, value in made.items()}


def tupled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a dataclass has them, a tuple for every list."""
    return {key: _tupled(value) for key, value in given.items()}


def _listed(value: object) -> object:
    return list(cast("tuple[object, ...]", value)) if isinstance(value, tuple) else value


def _tupled(value: object) -> object:
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


@functools.cache
def _checked(known: type) -> Callable[..., Any]:
    """A twin of a dataclass that checks its fields strictly. The class itself stays plain."""
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return pydantic.dataclasses.dataclass(known, frozen=True, config=config)
