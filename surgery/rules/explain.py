"""Turns what pydantic found wrong into sentences, and sentences into one ``RuleError``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from surgery.errors import RuleError
from surgery.registry import suggest
from surgery.rules.yaml import Loc, Mark, child, has, locate

if TYPE_CHECKING:
    from pydantic import ValidationError

Noun = Literal["key", "option", "argument"]

MOST = 20
"""Most problems that one error lists."""

Hint = Callable[[Loc, str], str]
"""Place of a mapping and a key it does not know → what to do about it."""

_EXPECTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dataclass_exact_type": "a mapping",
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "nothing",
    "string_sub_type": "a string",
    "string_type": "a string",
    "tuple_type": "a list",
}
_BOUNDS: Mapping[str, str] = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
}
_LENGTHS: Mapping[str, str] = {
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        loc: Keys and indices that lead to it from the top of the document.
        message: What was received and what was expected.
        hint: What to do about it.
        at_key: Whether the key itself is wrong, not its value.
        expected: For a value of the wrong type, the type it should have.
    """

    loc: Loc
    message: str
    hint: str | None = None
    at_key: bool = False
    expected: str | None = None


class Invalid(Exception):
    """Carries problems up to where the file and its lines are known."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(problems)
        self.problems = problems


def describe(value: object) -> str:
    """A value as an error message calls it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the string {shorten(value)!r}"
    if isinstance(value, int):
        return f"the integer {value}"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if isinstance(value, list) else "a tuple"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an object of type {type(value).__name__}"


def shorten(text: str) -> str:
    """``text``, its middle left out if it is long."""
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


def explain(error: ValidationError, data: object, hint: Hint, noun: Noun = "key") -> list[Problem]:
    """The problems behind a pydantic error.

    Args:
        error: What pydantic raised.
        data: What was validated.
        hint: What to suggest for an unknown key.
        noun: What a key is called; an ``argument`` is given in Python, not in a file.
    """
    found = [
        _problem(item, data, hint, noun)
        for item in error.errors(include_url=False)  # each with type, loc, input, msg, ctx
        if not _is_echo(item)
    ]
    return _join_alternatives(found)


def _is_echo(item: Mapping[str, Any]) -> bool:
    """Whether pydantic calls a list too short only because it did not count the wrong items."""
    given = item.get("input")
    return (
        item["type"] == "too_short"
        and isinstance(given, list | tuple)
        and len(cast("list[object]", given)) >= item["ctx"]["min_length"]
    )


def _problem(item: Mapping[str, Any], data: object, hint: Hint, noun: Noun) -> Problem:
    kind, given = str(item["type"]), item.get("input")
    context: Mapping[str, Any] = item.get("ctx") or {}
    loc = within(item["loc"], data)
    if kind == "surgery":
        at: Loc = context["at"]
        return Problem((*loc, *at), context["message"], context["hint"], context["at_key"])
    if kind == "missing":
        return Problem(loc, f"missing {noun} {item['loc'][-1]!r}")
    if kind in _UNKNOWN:
        key = str(item["loc"][-1])
        return Problem(loc, f"unknown {noun} {key!r}", hint(loc[:-1], key), at_key=True)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_tag(loc, context, given)
    if kind == "unexpected_positional_argument":
        return Problem((), f"too many arguments, the first of them {describe(given)}")
    if kind in ("literal_error", "enum"):
        return _wrong_choice(loc, str(context["expected"]), given)
    if expected := _expected(kind, context, given, noun):
        return _wrong_type(loc, expected, given)
    return Problem(loc, _complaint(kind, context, given) or _in_general(str(item["msg"]), given))


def _expected(kind: str, context: Mapping[str, Any], given: object, noun: Noun) -> str | None:
    """The type that a value should have, if its type is what is wrong."""
    if kind == "tuple_type" and isinstance(given, list):
        return "a tuple"
    if kind == "is_instance_of":
        wanted = str(context["class"])
        return "a list" if wanted == "Sequence" else f"an instance of {wanted}"
    if kind in ("dataclass_type", "dataclass_exact_type") and noun == "argument":
        return f"an instance of {context['class_name']}"
    return _EXPECTED.get(kind)


def _complaint(kind: str, context: Mapping[str, Any], given: object) -> str | None:
    """What is wrong with a value of the right type."""
    if kind in _BOUNDS:
        number = given if isinstance(given, int | float) else describe(given)
        bounds = {name: _plainly(bound) for name, bound in context.items()}
        return f"must be {_BOUNDS[kind].format(**bounds)}, got {number}"
    if kind in ("string_too_short", "too_short") and context["min_length"] == 1:
        return "must not be empty"
    if kind in _LENGTHS:
        return f"must have {_LENGTHS[kind].format(**context)}, got {describe(given)}"
    if kind in ("value_error", "assertion_error"):
        return f"{context['error']}"
    return None


def _plainly(bound: object) -> object:
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _in_general(message: str, given: object) -> str:
    return f"{message[:1].lower()}{message[1:]}, got {describe(given)}"


def within(loc: Sequence[str | int], data: object) -> Loc:
    """The part of ``loc`` that leads through ``data``.

    Pydantic mixes in the names of the branches of a union and, for a missing key, its name; and
    what the objects hold as a list of one may stand in the file without a list.
    """
    way: list[str | int] = []
    for step in loc:
        if has(data, step):
            way.append(step)
            data = child(data, step)
    return tuple(way)


def _wrong_type(loc: Loc, expected: str, given: object) -> Problem:
    message = f"expected {expected}, got {describe(given)}"
    return Problem(loc, message, _remedy(expected, given), expected=expected)


def _remedy(expected: str, given: object) -> str | None:
    """What to do about a value of the wrong type, where it is plain what was meant."""
    if given is None:
        return "give it a value, or leave the key out to use the default"
    if expected in ("an integer", "a number") and isinstance(given, str) and _is_number(given):
        return "remove the quotes"
    if expected == "true or false" and isinstance(given, str):
        return "write true or false, without quotes; yes, no, on and off are plain text"
    if expected == "a string" and isinstance(given, int | float):
        return "put it into quotes"
    if expected == "a list" and isinstance(given, Mapping):
        return "put '- ' before each item"
    if expected == "a list" and isinstance(given, str):
        return f"write [{shorten(given)}]"
    return None


def _wrong_choice(loc: Loc, expected: str, given: object) -> Problem:
    choices = re.findall(r"'([^']*)'", expected)
    near = suggest(given, choices) if isinstance(given, str) and choices else None
    hint = near if near is not None and near.startswith("did you mean") else None
    return Problem(loc, f"expected {expected}, got {describe(given)}", hint, expected=expected)


def _wrong_tag(loc: Loc, context: Mapping[str, Any], given: object) -> Problem:
    """What is wrong with the key that tells the kinds of a section apart."""
    key = str(context["discriminator"]).strip("'")
    if "tag" not in context:
        return Problem(loc, f"missing key {key!r}, which says of which kind this is")
    return _wrong_choice((*loc, key), str(context["expected_tags"]), child(given, key))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", text) is not None


def _join_alternatives(problems: Sequence[Problem]) -> list[Problem]:
    """One problem where the branches of a union each complain about the same value."""
    joined: dict[Loc, Problem] = {}
    others: list[Problem] = []
    for problem in problems:
        earlier = joined.get(problem.loc)
        if problem.expected is None:
            others.append(problem)
        elif earlier is None or earlier.expected is None:
            joined[problem.loc] = problem
        elif problem.expected not in earlier.expected:
            either = f"{earlier.expected} or {problem.expected}"
            message = problem.message.replace(problem.expected, either, 1)
            hint = earlier.hint or problem.hint
            joined[problem.loc] = replace(problem, message=message, hint=hint, expected=either)
    # A branch that got further into the value says more than one that refused its type.
    kept = [p for loc, p in joined.items() if not any(_below(other.loc, loc) for other in others)]
    return [*others, *kept]


def _below(loc: Loc, above: Loc) -> bool:
    return len(loc) > len(above) and loc[: len(above)] == above


def place(loc: Loc, data: object) -> str:
    """Where in the document ``loc`` is, in words: ``rule 'adapters', with.rank``."""
    if len(loc) < 2 or loc[0] != "rules":
        return dotted(loc)
    rule = _rule_name(loc[1], child(child(data, "rules"), loc[1]))
    return f"{rule}, {dotted(loc[2:])}" if len(loc) > 2 else rule


def _rule_name(index: str | int, rule: object) -> str:
    name, used = child(rule, "id"), child(rule, "pass")
    if isinstance(name, str) and name:
        return f"rule {shorten(name)!r}"
    number = f"rule {index + 1}" if isinstance(index, int) else f"rule {index}"
    return f"{number} ({shorten(used)})" if isinstance(used, str) and used else number


def dotted(loc: Loc) -> str:
    """``("where", "any", 0, "path")`` as ``where.any[0].path``."""
    text = ""
    for step in loc:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def report(
    problems: Iterable[Problem], data: object, file: str | None, start: Mark | None
) -> RuleError:
    """One error for all problems of a document, the first one first.

    Args:
        problems: At least one.
        data: The document.
        file: Its name, or None if it is not a file.
        start: Where it starts, or None if it is not a file; only a file has lines.
    """
    errors = [_error(problem, data, file, start) for problem in problems]
    errors.sort(key=lambda error: (error.line or 0, error.column or 0))
    return combine(errors)


def _error(problem: Problem, data: object, file: str | None, start: Mark | None) -> RuleError:
    # An unknown key is named in the message: the place is the mapping it stands in.
    where = place(within(problem.loc[:-1] if problem.at_key else problem.loc, data), data)
    message = f"{where}: {problem.message}" if where else problem.message
    if start is None:
        return RuleError(message, hint=problem.hint, file=file)
    line, column = locate(data, problem.loc, key=problem.at_key) or start
    return RuleError(message, hint=problem.hint, file=file, line=line, column=column)


def combine(errors: Sequence[RuleError]) -> RuleError:
    """The first error, with the others on lines of their own."""
    first = errors[0]
    if len(errors) == 1:
        return first
    hint = "" if first.hint is None else f"\n  hint: {first.hint}"
    rest = "".join(f"\n{error}" for error in errors[1:MOST])
    if len(errors) > MOST:
        rest += f"\n... and {len(errors) - MOST} more"
    return RuleError(
        f"{first.message}{hint}{rest}", file=first.file, line=first.line, column=first.column
    )
