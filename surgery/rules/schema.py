"""Recipes and rules: the objects, and how they are read from and written to YAML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar, Protocol, cast, runtime_checkable

from pydantic import AfterValidator, Field, InstanceOf, PlainValidator

from surgery import files
from surgery.errors import RuleError
from surgery.registry import suggest
from surgery.rules import document, migrate, yaml
from surgery.rules.explain import Invalid, Problem, describe, report
from surgery.rules.strict import invalid, options
from surgery.rules.where import Where


@runtime_checkable
class Options(Protocol):
    """A pass with its options: a dataclass whose class bears the name it is registered under."""

    name: ClassVar[str]


def _check_options(value: object) -> object:
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        raise invalid(
            f"expected a pass with its options, got {describe(value)}",
            hint="build one first, as in Rule(LowRank(rank=16))",
        )
    if not isinstance(value, Options):
        raise invalid(f"{type(value).__name__} is not a pass: its class has no 'name'")
    return value


def _check_id(text: str) -> str:
    return document.check_id(text) if text else text


@options
class Rule:
    """One rewrite: a pass with its options, and the sites it is for.

    Attributes:
        options: The pass, as in ``LowRank(rank=16)``.
        where: Sites it is for; None means every site that the pass accepts.
        except_: Sites it is not for, even if ``where`` holds.
        id: Name for messages, for the edit log and for ``created_by``. Left empty, the recipe
            gives the rule the name of its pass, with -2, -3, ... where that is taken.
        optional: Whether it may match nothing.
    """

    options: Annotated[Options, PlainValidator(_check_options)]
    where: InstanceOf[Where] | None = None
    except_: InstanceOf[Where] | None = None
    id: Annotated[str, AfterValidator(_check_id)] = ""
    optional: bool = False

    def dump(self) -> dict[str, Any]:
        """As it stands in a rule file, every option written out."""
        data: dict[str, Any] = {"id": self.id} if self.id else {}
        data["pass"] = self.options.name
        if self.where is not None:
            data["where"] = self.where.dump()
        if self.except_ is not None:
            data["except"] = self.except_.dump()
        if chosen := document.dump_options(self.options):
            data["with"] = chosen
        if self.optional:
            data["optional"] = True
        return data


def _not_empty(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    if not rules:
        raise invalid("the list is empty; a recipe has at least one rule")
    return tuple(rules)


def _check_version(value: object) -> object:
    if problem := migrate.check(value):
        raise invalid(problem.message, hint=problem.hint)
    return value


@options
class Recipe:
    """Rules that are carried out in order.

    Attributes:
        rules: At least one. They are kept as a tuple.
        recipe: A name for messages and tables.
        seed: What new parameters are drawn from, together with the names of their sites.
        version: Version of the rule language.
    """

    rules: Annotated[Sequence[Rule], AfterValidator(_not_empty)]
    recipe: Annotated[str, Field(min_length=1)] = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    version: Annotated[int, PlainValidator(_check_version)] = Field(
        default_factory=lambda: migrate.VERSION
    )

    def __post_init__(self) -> None:
        try:
            _refuse_clashes(self.rules)
        except Invalid as error:
            raised = report(
                error.problems, {"rules": [rule.dump() for rule in self.rules]}, None, None
            )
        else:
            object.__setattr__(self, "rules", _with_ids(self.rules))
            return
        raise raised

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a rule file.

        Raises:
            RuleError: there is no such file, or something in it is wrong; with line and column.
        """
        return cls.loads(
            yaml.decode(yaml.read(FilePath(path), "rule file", "rule files", RuleError), str(path)),
            str(path),
        )

    @classmethod
    def loads(cls, text: str, file: str = "<string>") -> Recipe:
        """Read the text of a rule file.

        Args:
            text: The YAML document.
            file: Name to put into errors.

        Raises:
            RuleError: something is wrong; with line and column.
        """
        return cls._build(*yaml.load(text, file), file)

    @classmethod
    def parse(cls, data: object) -> Recipe:
        """Build a recipe from plain data, such as ``dump`` returns.

        Raises:
            RuleError: something is wrong.
        """
        return cls._build(data, None, None)

    @classmethod
    def _build(cls, data: object, start: yaml.Mark | None, file: str | None) -> Recipe:
        try:
            data = document.migrated(data)
            read = document.read(data)
            rules = tuple(_build(rule) for rule in read.rules)
            _refuse_clashes(rules)
        except Invalid as error:
            raised = report(error.problems, data, file, start)
        else:
            return cls(rules=rules, recipe=read.recipe, seed=read.seed, version=read.version)
        raise raised

    def dump(self) -> dict[str, Any]:
        """As JSON-able data that ``parse`` reads back to an equal recipe."""
        return {
            "version": self.version,
            "recipe": self.recipe,
            "seed": self.seed,
            "rules": [rule.dump() for rule in self.rules],
        }

    def to_yaml(self) -> str:
        """As a rule file that ``loads`` reads back to an equal recipe.

        Ids and options are all written out, so that the file does not change its meaning when a
        default does.
        """
        return yaml.dump(self.dump())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a rule file: beside its place, then renamed, so that it is never half there.

        Raises:
            RuleError: the folder does not exist or cannot be written to.
        """
        target = FilePath(path)
        try:
            files.write(target, self.to_yaml())
        except OSError as error:
            raise RuleError(f"cannot be written: {error.strerror}", file=str(target)) from error


def _build(rule: document.RuleDocument) -> Rule:
    return Rule(
        cast("Options", rule.with_),
        where=rule.where,
        except_=rule.except_,
        id=rule.id,
        optional=rule.optional,
    )


def _with_ids(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules, each with an id: its own, or the name of its pass and a number."""
    return tuple(
        rule if rule.id else dataclasses.replace(rule, id=name)
        for rule, name in zip(rules, _ids(rules), strict=True)
    )


def _ids(rules: Sequence[Rule]) -> list[str]:
    taken = {rule.id for rule in rules if rule.id}
    names: list[str] = []
    for rule in rules:
        name, number = rule.id or rule.options.name, 2
        while not rule.id and name in taken:
            name, number = f"{rule.options.name}-{number}", number + 1
        taken.add(name)
        names.append(name)
    return names


def _refuse_clashes(rules: Sequence[Rule]) -> None:
    """Raise ``Invalid`` for two rules with one id, or one that builds on a rule to come."""
    if problems := [*_doubled_ids(rules), *_unmade(rules)]:
        raise Invalid(*problems)


def _doubled_ids(rules: Sequence[Rule]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, rule in enumerate(rules):
        if rule.id and first.setdefault(rule.id, index) != index:
            message = f"rule {first[rule.id] + 1} already has the id {rule.id!r}"
            yield Problem(("rules", index, "id"), message, "give each rule an id of its own")


def _unmade(rules: Sequence[Rule]) -> Iterator[Problem]:
    """``created_by`` values that do not name an earlier rule."""
    ids = _ids(rules)
    for index, rule in enumerate(rules):
        for key, where in (("where", rule.where), ("except", rule.except_)):
            for way, inner in where.nested() if where is not None else ():
                loc = ("rules", index, key, *way, "created_by")
                for position, name in enumerate(inner.created_by):
                    if name not in ids[:index]:
                        yield Problem((*loc, position), *_why_unmade(name, index, ids))


def _why_unmade(name: str, index: int, ids: Sequence[str]) -> tuple[str, str]:
    if name == ids[index]:
        return f"{name!r} is this rule itself", "name an earlier rule"
    if name in ids:
        return f"rule {name!r} comes later", "move it before this one: rules run in order"
    earlier = ids[:index]
    hint = suggest(name, earlier) if earlier else "this is the first rule: none comes before it"
    return f"no earlier rule has the id {name!r}", hint
