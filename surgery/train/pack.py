"""Nested state as tensors and JSON, and back: what a checkpoint holds, without pickle.

An optimizer's state is mappings (some with integer keys), lists, tuples, numbers and tensors.
Tensors go into a flat mapping; the rest is kept as JSON that refers to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from surgery.errors import CheckpointError

Flat = dict[str, Tensor]

_SCALARS = (str, int, float, bool, type(None))


def pack(state: object, name: str) -> tuple[Any, Flat]:
    """Split state into JSON and tensors.

    Args:
        state: Mappings, lists, tuples, numbers, text and tensors.
        name: What the tensors' names begin with.

    Raises:
        CheckpointError: something in it is of another kind.
    """
    tensors: Flat = {}
    return _packed(state, name, tensors), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``pack`` was given.

    Raises:
        CheckpointError: the JSON is not what ``pack`` makes, or names a tensor that is not there.
    """
    if isinstance(packed, dict):
        return _unpacked(cast("dict[str, Any]", packed), tensors)
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in cast("list[Any]", packed)]
    return packed


def _unpacked(packed: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The value of one of the objects by which ``_packed`` stands for what is no JSON."""
    kind, value = next(iter(packed.items())) if len(packed) == 1 else ("", None)
    items = cast("list[Any]", value) if isinstance(value, list) else []
    if kind == "tensor" and isinstance(value, str) and value in tensors:
        return tensors[value]
    if kind == "tuple" and isinstance(value, list):
        return tuple(unpack(item, tensors) for item in items)
    if kind == "pairs" and isinstance(value, list) and all(map(_is_pair, items)):
        return {key: unpack(item, tensors) for key, item in items}
    raise CheckpointError(
        f"a checkpoint's state is damaged: {str(packed)[:80]!r} stands for nothing in it",
        hint="resume from an earlier checkpoint",
    )


def _is_pair(item: object) -> bool:
    if not isinstance(item, list):
        return False
    pair = cast("list[object]", item)
    return len(pair) == 2 and isinstance(pair[0], _SCALARS)


def _packed(state: object, at: str, tensors: Flat) -> Any:
    if isinstance(state, Tensor):
        tensors[at] = state
        return {"tensor": at}
    if isinstance(state, Mapping):
        # Pairs, since a key may be an integer, which JSON would turn into text.
        items = cast("Mapping[Any, object]", state).items()
        return {"pairs": [[key, _packed(item, f"{at}.{key}", tensors)] for key, item in items]}
    if isinstance(state, list | tuple):
        found = [
            _packed(item, f"{at}.{index}", tensors)
            for index, item in enumerate(cast("Sequence[object]", state))
        ]
        return found if isinstance(state, list) else {"tuple": found}
    if isinstance(state, _SCALARS):
        return state
    raise CheckpointError(
        f"{at} is {type(state).__name__}, which a checkpoint cannot hold",
        hint="keep state as tensors, numbers, text, lists and mappings",
    )
