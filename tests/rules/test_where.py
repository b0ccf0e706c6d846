from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import RuleError
from surgery.rules import CreatedBy, Layers, Path, Role, Shape, Sizes, Stack, Type, Where
from tests.rules.samples import wheres

Truth = Callable[[str, Any], bool]


def holds(where: Where, truth: Truth) -> bool:
    """Whether a condition holds, given which single values do."""
    keys = ("path", "type", "role", "layers", "shape", "stack", "created_by")
    plain = [(key, getattr(where, key)) for key in keys if getattr(where, key)]
    return (
        all(any(truth(key, value) for value in values) for key, values in plain)
        and (not where.any_ or any(holds(branch, truth) for branch in where.any_))
        and (where.not_ is None or not holds(where.not_, truth))
    )


_conditions = wheres(["one", "two"])
_truths = st.integers(0, 2**32).map(
    lambda salt: lambda key, value: hash((salt, key, value)) % 2 == 0
)


@given(_conditions, _conditions, _truths)
def test_operators_mean_what_they_say(one: Where, two: Where, truth: Truth):
    assert holds(one & two, truth) == (holds(one, truth) and holds(two, truth))
    assert holds(one | two, truth) == (holds(one, truth) or holds(two, truth))
    assert holds(~one, truth) != holds(one, truth)
    assert holds(~~one, truth) == holds(one, truth)


COMBINED = [
    (Role("attention.qkv") & Layers("-8:"), {"role": "attention.qkv", "layers": "-8:"}),
    (Path("a") | Path("b", "a"), {"path": ["a", "b"]}),
    (Path("a") | Type("B"), {"any": [{"path": "a"}, {"type": "B"}]}),
    (
        Path("a") | Type("B") | Role("norm"),
        {"any": [{"path": "a"}, {"type": "B"}, {"role": "norm"}]},
    ),
    (Path("a") & Path("b"), {"path": "a", "any": [{"path": "b"}]}),
    (~Path("a"), {"not": {"path": "a"}}),
    (~Path("a") & ~Type("B"), {"not": {"any": [{"path": "a"}, {"type": "B"}]}}),
    (~Path("a") & ~Path("b"), {"not": {"path": ["a", "b"]}}),
    (Layers(0, -1, "2:4"), {"layers": [0, -1, "2:4"]}),
    (Shape(in_=">=256", rank=3), {"shape": {"in": ">=256", "rank": 3}}),
    (Shape(in_=1) | Shape(out="==2"), {"shape": [{"in": 1}, {"out": 2}]}),
    (Stack("largest") & ~CreatedBy("x"), {"stack": "largest", "not": {"created_by": "x"}}),
]


@pytest.mark.parametrize(("where", "dumped"), COMBINED)
def test_combination(where: Where, dumped: dict[str, Any]):
    assert where.dump() == dumped


# What a type checker would refuse is tested all the same.
_path: Any = Path
_layers: Any = Layers
_where: Any = Where
_sizes: Any = Sizes

BAD: list[tuple[Callable[[], object], str]] = [
    (Path, "path: expected at least one value, got none"),
    (lambda: _path(3), "Where.path: expected a string, got the integer 3"),
    (lambda: Path("a", "b["), "Where.path[1]: path 'b[': '[' at character 2 is never closed"),
    (lambda: Role("atention.q"), "Where.role: unknown role 'atention.q'\n  hint: did you mean"),
    (lambda: Layers(True), 'Where.layers: expected an index or a slice such as "-8:", got true'),
    (lambda: _layers(1.0), "got the number 1.0"),
    (lambda: Type("*"), "Where.type: '*' is not the name of a class"),
    (lambda: CreatedBy(""), "Where.created_by: expected the id of an earlier rule, got an empty"),
    (Shape, "Sizes: compares nothing"),
    (lambda: Shape(in_="big"), "Sizes.in_: 'big' is not a comparison"),
    (lambda: Shape(in_=-1), "Sizes.in_: '-1' is not a comparison"),
    (Where, "Where: selects by nothing"),
    (lambda: _where(path=[]), "Where.path: the list is empty, so nothing could match"),
    (lambda: _where(pth="a"), "Where: unknown argument 'pth'\n  hint: did you mean 'path'?"),
    (lambda: _where(not_=3), "Where.not_: expected an instance of Where, got the integer 3"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_selector(build: Callable[[], object], message: str):
    with pytest.raises(RuleError, match=re.escape(message)):
        build()


def test_comparisons_are_canonical():
    assert Sizes(in_="  256 ,  <= 512") == Sizes(in_="==256, <=512")
    assert dict(_sizes(out=4, rank="3").comparisons) == {"out": "==4", "rank": "==3"}


def test_nested_leads_to_every_condition():
    where = (Path("a") | Type("B")) & ~Role("norm")
    assert dict(where.nested()) == {
        (): where,
        ("any", 0): Path("a"),
        ("any", 1): Type("B"),
        ("not",): Role("norm"),
    }


@given(_conditions)
def test_conditions_are_values(where: Where):
    assert pickle.loads(pickle.dumps(where)) == where  # noqa: S301 - our own bytes
    assert copy.deepcopy(where) == where
    assert hash(copy.deepcopy(where)) == hash(where)
