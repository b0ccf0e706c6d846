"""Example: built from what a user writes, moved, and given another shape."""

from __future__ import annotations

import re

import pytest
import torch

from surgery import SourceError
from surgery.sources import Example, variants

X = torch.arange(6.0).reshape(2, 3)
IDS = torch.arange(24).reshape(2, 12)
TEXT = Example((), {"ids": IDS, "mask": torch.ones_like(IDS), "states": torch.rand(2, 12, 5)})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (X, Example((X,))),
        ((X, 1), Example((X, 1))),
        ([X], Example((X,))),
        ({"x": X}, Example((), {"x": X})),
        (Example((X,), {"a": 1}), Example((X,), {"a": 1})),
    ],
    ids=["tensor", "tuple", "list", "dict", "example"],
)
def test_coerce(value: object, expected: Example) -> None:
    found = Example.coerce(value)
    assert len(found.args) == len(expected.args)
    assert all(a is b for a, b in zip(found.args, expected.args, strict=True))
    assert found.kwargs == expected.kwargs


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "got str, expected a tensor, a tuple of positional arguments, a dict"),
        (None, "got NoneType"),
        ({1: X}, "keyword names must be strings, got 1"),
    ],
)
def test_coerce_refuses(value: object, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        Example.coerce(value)


def test_to_casts_floats_only_however_nested() -> None:
    nested = Example((), {"a": {"b": [X, (IDS,)]}, "flag": True, "none": None})
    moved = nested.to("meta", torch.float16)
    inner = moved.kwargs["a"]["b"]
    assert (inner[0].dtype, inner[0].is_meta) == (torch.float16, True)
    assert (inner[1][0].dtype, inner[1][0].is_meta) == (torch.int64, True)
    assert (moved.kwargs["flag"], moved.kwargs["none"]) == (True, None)
    assert X.dtype == torch.float32


def test_another_batch() -> None:
    example = Example(
        (X,), {"places": torch.zeros(7, 3), "shapes": [[(1, 4)], [(2, 2)]], "s": X[0]}
    )
    with pytest.raises(SourceError, match="share no leading dimension"):
        example.resized(batch=3)
    example.kwargs["more"] = X
    example.kwargs["again"] = X[:, 0]
    larger = example.resized(batch=3)
    assert torch.equal(larger.args[0], X[[0, 1, 0]])
    assert larger.kwargs["places"].shape == (7, 3)
    assert larger.kwargs["shapes"] == [[(1, 4)], [(2, 2)], [(1, 4)]]
    assert torch.equal(example.resized(batch=1).args[0], X[:1])


def test_shorter_sequences_cut_what_belongs_together() -> None:
    shorter = TEXT.resized(shorten=4)
    shapes = [tuple(tensor.shape) for tensor in shorter.tensors()]
    assert shapes == [(2, 8), (2, 8), (2, 8, 5)]
    assert torch.equal(shorter.kwargs["ids"], IDS[:, :8])
    with pytest.raises(SourceError, match="no sequence longer than 12"):
        TEXT.resized(shorten=12)


def test_variants() -> None:
    shapes = [[tuple(tensor.shape) for tensor in other.tensors()] for other in variants(TEXT)]
    assert shapes == [[(3, 12), (3, 12), (3, 12, 5)], [(2, 8), (2, 8), (2, 8, 5)]]
    assert [other.batch() for other in variants(Example((X,)))] == [3]
    assert variants(Example((), {"a": torch.zeros(4, 2), "b": torch.zeros(2, 3)})) == ()
    assert variants(Example()) == ()


def test_is_frozen() -> None:
    with pytest.raises(AttributeError, match=re.escape("cannot assign to field 'args'")):
        Example().args = ()  # pyright: ignore[reportAttributeAccessIssue]
