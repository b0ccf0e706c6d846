"""Which sites a rule is about: ``Where``, and the constructors it is written with in Python.

Role("attention.qkv") & Layers("-8:") & ~Path("**.layers.0.**")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from surgery.errors import RuleError
from surgery.rules import match
from surgery.rules.explain import Problem, describe
from surgery.rules.strict import invalid, options, problem_error


def _told(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """A check of ``match`` as a pydantic validator."""

    def validator(text: str) -> Any:
        try:
            return check(text)
        except RuleError as error:
            raise problem_error(Problem((), error.message, error.hint)) from None

    return validator


def _one_or_several(value: object) -> tuple[object, ...]:
    if isinstance(value, tuple):
        return cast("tuple[object, ...]", value)
    if not isinstance(value, list):
        return (value,)
    if not value:
        raise invalid("the list is empty, so nothing could match", hint="leave the key out")
    return tuple(cast("list[object]", value))


def _some(value: object) -> object:
    return _one_or_several(cast("object", value)) if isinstance(value, list) else value


def _condition(value: object) -> object:
    if value is None:
        raise invalid("expected a condition, got nothing", hint="leave the key out")
    return value


def _layer_text(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        match.parse_layers(value)
        return value
    raise invalid(f'expected an index or a slice such as "-8:", got {describe(value)}')


def _comparison_text(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return match.check_comparison(str(value))
    if isinstance(value, str):
        return match.check_comparison(value)
    raise invalid(f'expected a number or a comparison such as ">=256", got {describe(value)}')


def _nonempty(text: str) -> str:
    if not text:
        raise invalid("expected the id of an earlier rule, got an empty string")
    return text


_Several = BeforeValidator(_one_or_several)
_Paths = Annotated[tuple[Annotated[str, AfterValidator(_told(match.check_path))], ...], _Several]
_Types = Annotated[tuple[Annotated[str, AfterValidator(_told(match.check_type))], ...], _Several]
_Roles = Annotated[tuple[Annotated[str, AfterValidator(_told(match.check_role))], ...], _Several]
_Stacks = Annotated[tuple[Annotated[str, AfterValidator(_told(match.check_stack))], ...], _Several]
_Ids = Annotated[tuple[Annotated[str, AfterValidator(_nonempty)], ...], _Several]
_Layers = Annotated[
    tuple[Annotated[str, BeforeValidator(_told(cast("Any", _layer_text)))], ...], _Several
]
_Comparison = Annotated[str | None, BeforeValidator(_told(cast("Any", _comparison_text)))]


@options(strict=False)
class Sizes:
    """What ``shape`` asks of one site. Every comparison that is given must hold.

    A comparison is ``">=256"``, ``"<1024"``, ``"==768"``, ``"!=1"``, several of them with commas
    between, which must all hold, or a number, which must be equal.

    Attributes:
        in_: Width of the input (``in`` in a rule file).
        out: Width of the output.
        rank: Number of dimensions of the weight.
        numel: Number of elements of the weight.
    """

    in_: _Comparison = Field(default=None, validation_alias="in")
    out: _Comparison = None
    rank: _Comparison = None
    numel: _Comparison = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.comparisons:
            raise invalid("compares nothing", hint='name a size, as in shape: {in: ">=256"}')
        return self

    @property
    def comparisons(self) -> Mapping[str, str]:
        """Key of ``match.SHAPE_KEYS`` → canonical comparison, for ``match.shape_matches``."""
        found = {"in": self.in_, "out": self.out, "rank": self.rank, "numel": self.numel}
        return {key: text for key, text in found.items() if text is not None}

    def dump(self) -> dict[str, str | int]:
        """As it stands in a rule file."""
        return {key: _number_or_text(text) for key, text in self.comparisons.items()}


@options(strict=False)
class Where:
    """A condition on sites. Every key that is given must hold; of a key's values, any one.

    ``surgery.rules.match`` says exactly what each value means. Conditions combine with ``&``,
    ``|`` and ``~``.

    Attributes:
        path: Globs or ``re:`` patterns for the site's dotted path.
        type: Class names, compared with those of the module's class and its bases.
        role: Roles, resolved from the model's structure.
        layers: Python slices or indices over the stack the site is in.
        shape: Comparisons with the sizes of the site's weight.
        stack: ``all``, ``largest`` or a path pattern: the stack the site is in.
        created_by: Ids of earlier rules, one of which made the site.
        any_: Conditions one of which must hold (``any`` in a rule file).
        not_: A condition that must not hold (``not`` in a rule file).
    """

    path: _Paths = ()
    type: _Types = ()
    role: _Roles = ()
    layers: _Layers = ()
    shape: Annotated[tuple[Sizes, ...], _Several] = ()
    stack: _Stacks = ()
    created_by: _Ids = ()
    any_: Annotated[tuple[Where, ...], BeforeValidator(_some)] = Field(
        default=(), validation_alias="any"
    )
    not_: Annotated[Where | None, BeforeValidator(_condition)] = Field(
        default=None, validation_alias="not"
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self._given():
            raise invalid(
                "selects by nothing",
                hint="name a path, type, role, ..., or leave it out to mean every site that "
                "the pass accepts",
            )
        return self

    def __and__(self, other: Where) -> Where:
        """Both hold."""
        mine, theirs = self._given(), other._given()
        merged = {**theirs, **mine}
        clash = {key: value for key, value in theirs.items() if key in mine}
        if "not_" in clash:
            merged["not_"] = mine["not_"] | clash.pop("not_")
        if clash:
            both = Where(**clash)
            if "any_" not in merged:
                merged["any_"] = (both,)
            else:
                denied = Where(not_=both)
                merged["not_"] = merged["not_"] | denied if "not_" in merged else denied
        return Where(**merged)

    def __or__(self, other: Where) -> Where:
        """One of the two holds."""
        mine, theirs = self._given(), other._given()
        if mine.keys() == theirs.keys() and len(mine) == 1 and "not_" not in mine:
            ((key, values),) = mine.items()
            either: dict[str, Any] = {key: tuple(dict.fromkeys((*values, *theirs[key])))}
            return Where(**either)
        return Where(any_=tuple(dict.fromkeys((*self._branches(), *other._branches()))))

    def __invert__(self) -> Where:
        """It does not hold."""
        given = self._given()
        return given["not_"] if given.keys() == {"not_"} else Where(not_=self)

    def _branches(self) -> tuple[Where, ...]:
        return self.any_ if self._given().keys() == {"any_"} else (self,)

    def _given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value not in ((), None)}

    def nested(self) -> Iterator[tuple[tuple[str | int, ...], Where]]:
        """This condition and all within it, each with the keys that lead to it."""
        yield (), self
        for index, branch in enumerate(self.any_):
            yield from ((("any", index, *way), inner) for way, inner in branch.nested())
        if self.not_ is not None:
            yield from ((("not", *way), inner) for way, inner in self.not_.nested())

    def dump(self) -> dict[str, Any]:
        """As it stands in a rule file."""
        data: dict[str, Any] = {}
        for name, values in self._given().items():
            if name == "not_":
                data["not"] = values.dump()
            elif name == "any_":
                data["any"] = [branch.dump() for branch in values]
            else:
                dumped = [_value(name, value) for value in values]
                data[name] = dumped[0] if len(dumped) == 1 else dumped
        return data


def _value(name: str, value: Any) -> Any:
    if name == "shape":
        return value.dump()
    return _number_or_text(value) if name == "layers" else value


def _number_or_text(text: str) -> int | str:
    """A layer's index and an equality are written as the number they are."""
    digits = text.removeprefix("==")
    number = int(digits) if digits.removeprefix("-").isdecimal() else None
    return text if number is None or str(number) != digits else number


def _selector(key: str, values: tuple[Any, ...]) -> Where:
    if not values:
        raise RuleError(f"{key}: expected at least one value, got none")
    given: dict[str, Any] = {key: values[0] if len(values) == 1 else values}
    return Where(**given)


def Path(*patterns: str) -> Where:  # noqa: N802 - selectors read like types
    """Sites whose path matches one of the globs or ``re:`` patterns."""
    return _selector("path", patterns)


def Type(*names: str) -> Where:  # noqa: N802
    """Sites whose class, or a base of it, bears one of the names."""
    return _selector("type", names)


def Role(*roles: str) -> Where:  # noqa: N802
    """Sites that play one of the roles, such as ``attention.qkv`` or ``mlp``."""
    return _selector("role", roles)


def Layers(*layers: str | int) -> Where:  # noqa: N802
    """Sites in layers that one of the slices or indices selects."""
    return _selector("layers", layers)


def Shape(  # noqa: N802
    *,
    in_: str | int | None = None,
    out: str | int | None = None,
    rank: str | int | None = None,
    numel: str | int | None = None,
) -> Where:
    """Sites whose sizes satisfy every comparison, such as ``in_=">=256"``."""
    given: dict[str, Any] = {"in_": in_, "out": out, "rank": rank, "numel": numel}
    sizes = Sizes(**{key: value for key, value in given.items() if value is not None})
    return Where(shape=(sizes,))


def Stack(*stacks: str) -> Where:  # noqa: N802
    """Sites in a stack: ``all``, ``largest``, or a path pattern."""
    return _selector("stack", stacks)


def CreatedBy(*ids: str) -> Where:  # noqa: N802
    """Sites that one of the rules with these ids made."""
    return _selector("created_by", ids)
