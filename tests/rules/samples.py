"""Passes that exist only for the tests of the rules, and strategies that draw rules."""

from __future__ import annotations

import enum
from typing import Annotated, Any, ClassVar, Literal

import pydantic.dataclasses
from hypothesis import strategies as st
from pydantic import Field, field_validator

from surgery.errors import RuleError
from surgery.rules import Recipe, Rule, Sizes, Where, invalid, options
from surgery.rules.match import GROUPS, ROLES


class Keep(enum.Enum):
    MEMORY = "memory"
    NONE = "none"


@options
class Window:
    """An option made of options."""

    start: int = 0
    stop: int | None = None


@options
class Patch:
    """Contract: exact. Every kind of option that a pass may have."""

    name: ClassVar[str] = "patch"

    rank: Annotated[int, Field(gt=0, le=4096)] = 8
    alpha: float | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    method: Literal["lora", "reflora"] = "lora"
    label: str = "default"
    slices: Annotated[tuple[Literal["q", "k", "v"], ...], Field(min_length=1)] | None = None
    every: int | Literal["auto"] = "auto"
    bias: bool = False
    keep: Keep = Keep.NONE
    window: Window = Window()
    weights: dict[str, float] | None = None
    windows: dict[str, Window] | None = None
    notes: dict[str, Any] | None = None

    @field_validator("label")
    @classmethod
    def _label_is_short(cls, value: str) -> str:
        if len(value) > 40:
            raise ValueError("a label has at most 40 characters")
        return value

    def __post_init__(self) -> None:
        if self.method == "reflora" and self.slices:
            raise invalid("reflora adapts a layer as a whole", hint="leave slices out", at="slices")


@options
class Needy:
    """Contract: exact. Has an option without a default."""

    name: ClassVar[str] = "needy"

    size: int


@pydantic.dataclasses.dataclass(frozen=True)
class Plain:
    """Contract: exact. A pass of a package that knows nothing of ``surgery.rules.options``."""

    name: ClassVar[str] = "plain"

    size: int = 1

    @field_validator("size")
    @classmethod
    def _even(cls, value: int) -> int:
        if value == 13:
            raise RuleError("size 13 is unlucky", hint="take another")
        return value


PASSES: dict[str, Any] = {"patch": Patch, "needy": Needy, "plain": Plain}


def _several(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, min_size=1, max_size=3).map(tuple)


segments = st.sampled_from(["**", "*", "layers", "[0-3]", "{q,k}_proj", "blocks.{0,1}", "q?", "ä"])
paths = st.lists(segments, min_size=1, max_size=4).map(".".join) | st.sampled_from(
    ["re:.*q_proj", "re:a: b #c", "re:[^.]+\\.\"'x", "null", "1", "true", "re: ", "- a", "a\u2028b"]
)
classes = st.sampled_from(["Linear", "torch.nn.Linear", "transformers.Conv1D"])
roles = st.sampled_from([*ROLES, *GROUPS])
layers = st.sampled_from(["-8:", "::2", "4:20", "-1", "3", ":", "::-1"])
comparisons = st.sampled_from([">=256", "<1024", "==768", "!=1", ">=256, <1024", ">0"])
sizes = st.builds(
    lambda given: Sizes(**given),
    st.dictionaries(st.sampled_from(["in_", "out", "rank", "numel"]), comparisons, min_size=1),
)
ids = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,9}\Z") | st.sampled_from(["1", "null", "1e3"])


def wheres(created_by: list[str], depth: int = 2) -> st.SearchStrategy[Where]:
    """Conditions; ``created_by`` are the ids that they may name."""
    keys: dict[str, st.SearchStrategy[Any]] = {
        "path": _several(paths),
        "type": _several(classes),
        "role": _several(roles),
        "layers": _several(layers),
        "shape": _several(sizes),
        "stack": _several(st.sampled_from(["all", "auto", "largest"]) | paths),
    }
    if created_by:
        keys["created_by"] = _several(st.sampled_from(created_by))
    if depth:
        keys["any_"] = _several(wheres(created_by, depth - 1))
        keys["not_"] = wheres(created_by, depth - 1)
    chosen = st.sets(st.sampled_from(sorted(keys)), min_size=1, max_size=3)
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({name: keys[name] for name in sorted(names)})
    ).map(lambda given: Where(**given))


numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
windows = st.builds(Window, start=st.integers(-9, 9), stop=st.none() | st.integers(-9, 9))
patches = st.builds(
    Patch,
    rank=st.integers(1, 64),
    alpha=st.none() | numbers,
    dropout=st.floats(0, 1, exclude_max=True),
    label=texts,
    slices=st.none() | st.lists(st.sampled_from("qkv"), min_size=1, max_size=3).map(tuple),
    every=st.just("auto") | st.integers(-(2**63), 2**63 - 1),
    bias=st.booleans(),
    keep=st.sampled_from(Keep),
    window=windows,
    weights=st.none() | st.dictionaries(texts, numbers, max_size=3),
    windows=st.none() | st.dictionaries(texts, windows, max_size=2),
    notes=st.none() | st.dictionaries(texts, st.none() | texts | st.lists(texts), max_size=2),
)
passes = (
    patches | st.builds(Needy, size=st.integers(-5, 5)) | st.builds(Plain, size=st.integers(2, 9))
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of one to four rules, with and without ids of their own."""
    names = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    rules: list[Rule] = []
    earlier: list[str] = []
    for name in names:
        conditions = st.none() | wheres(earlier)
        named = draw(st.booleans())
        rules.append(
            Rule(
                draw(passes),
                where=draw(conditions),
                except_=draw(conditions),
                id=name if named else "",
                optional=draw(st.booleans()),
            )
        )
        earlier += [name] if named else []
    title = draw(texts.filter(bool))
    return Recipe(rules=rules, recipe=title, seed=draw(st.integers(0, 2**63 - 1)))
