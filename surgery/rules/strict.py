"""Frozen dataclasses that check their fields strictly and complain in ``RuleError``s."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, dataclass_transform, get_args, get_origin, overload

import pydantic
import pydantic.dataclasses
from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from surgery.errors import RuleError
from surgery.registry import suggest
from surgery.rules.explain import Problem, combine, dotted, explain
from surgery.rules.yaml import Loc

C = TypeVar("C", bound=type)


def invalid(message: str, *, hint: str | None = None, at: str | None = None) -> Exception:
    """The error to raise in a pydantic validator, so that it is told like every other.

    Args:
        message: What was received and what was expected.
        hint: What to do about it.
        at: The option at fault, where a validator looks at several.
    """
    return problem_error(Problem(() if at is None else (at,), message, hint))


def problem_error(problem: Problem) -> PydanticCustomError:
    """A problem in the form pydantic carries along."""
    context = {
        "message": problem.message,
        "hint": problem.hint,
        "at": problem.loc,
        "at_key": problem.at_key,
    }
    return PydanticCustomError("surgery", "{message}", context)


@overload
def options(cls: C) -> C: ...
@overload
def options(*, strict: bool = True) -> Callable[[C], C]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def options(cls: type | None = None, *, strict: bool = True) -> Any:
    """Make a class a frozen pydantic dataclass with strict types and no unknown fields.

    The options of a pass, an adapter or a topology are declared with it. A wrong value raises
    ``RuleError`` where the object is built; in a rule file, pydantic's own error finds its line.
    A list is taken for a tuple, as in a rule file, which knows nothing but lists.

    Args:
        cls: The class, with one annotated attribute per option.
        strict: Whether text is refused for a number, and so on.
    """
    if cls is None:
        return functools.partial(options, strict=strict)
    config = ConfigDict(
        strict=strict,
        extra="forbid",
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        validate_default=False,
    )
    built = cast("Any", pydantic.dataclasses.dataclass(cls, frozen=True, config=config))
    built.__init__ = _told_in_rule_errors(built)
    return built


def _told_in_rule_errors(cls: Any) -> Callable[..., None]:
    original = cls.__init__
    names = option_names(cls)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        # What has a validator of its own says itself which lists it takes.
        fields = cls.__pydantic_fields__.items()
        kinds = {name: field.annotation for name, field in fields if not field.metadata}
        # A positional argument too many has no name; pydantic says what is wrong with it.
        placed = [
            _unlisted(value, kinds.get(name))
            for name, value in itertools.zip_longest(names[: len(args)], args)
        ]
        named = {name: _unlisted(value, kinds.get(name)) for name, value in kwargs.items()}
        try:
            original(self, *placed, **named)
        except ValidationError as error:
            raised = _rule_error(cls, error, args, kwargs)
        else:
            return
        raise raised

    return __init__


def _unlisted(value: object, kind: object) -> object:
    """A value with tuples for its lists, if an option of this type takes any."""
    if isinstance(value, list) and _takes_tuple(kind):
        return tuple(_unlisted(each, kind) for each in cast("list[object]", value))
    return cast("object", value)


def _takes_tuple(kind: object) -> bool:
    return get_origin(kind) is tuple or any(_takes_tuple(part) for part in get_args(kind))


def _rule_error(
    cls: type, error: ValidationError, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> RuleError:
    names = option_names(cls)
    # Pydantic knows a positional argument by its number only.
    given = {**dict(zip(names, args, strict=False)), **dict(enumerate(args)), **kwargs}
    problems = explain(error, given, lambda loc, key: suggest(key, names), "argument")
    return combine([_located(cls, problem, names) for problem in problems])


def _located(cls: type, problem: Problem, names: list[str]) -> RuleError:
    loc: Loc = problem.loc[:-1] if problem.at_key else problem.loc
    if loc and isinstance(loc[0], int) and loc[0] < len(names):
        loc = (names[loc[0]], *loc[1:])
    return RuleError(f"{dotted((cls.__name__, *loc))}: {problem.message}", hint=problem.hint)


def option_names(cls: type) -> list[str]:
    """Names of the fields a class is built from, in order."""
    return [field.name for field in dataclasses.fields(cls) if field.init]
