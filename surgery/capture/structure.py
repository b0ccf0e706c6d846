"""Nested arguments and results: tuples, lists, dicts and slices with leaves in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

_LISTS = frozenset({list, immutable_list})
_DICTS = frozenset({dict, immutable_dict})


def map_structure(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """``value`` with every leaf of its tuples, lists, dicts and slices passed through ``leaf``."""
    kind = class_of(value)
    if kind in _LISTS:
        return [map_structure(item, leaf) for item in value]
    if kind in _DICTS:
        return {key: map_structure(item, leaf) for key, item in value.items()}
    if kind is slice:
        bounds = (value.start, value.stop, value.step)
        return slice(*(map_structure(bound, leaf) for bound in bounds))
    if issubclass(kind, tuple):
        return rebuild(class_of(value), [map_structure(item, leaf) for item in value])
    return leaf(value)


def leaves(value: Any) -> list[Any]:
    """The leaves of a nested structure, in order."""
    found: list[Any] = []
    map_structure(value, found.append)
    return found


def class_of(value: object) -> type[Any]:
    """``type(value)``, whatever ``value`` was narrowed to before."""
    return type(value)


def rebuild(kind: type[Any], items: list[Any]) -> Any:
    """A tuple or list of type ``kind`` holding ``items``.

    A ``torch.Size`` of anything but numbers becomes a tuple.
    """
    if kind is torch.Size and not all(isinstance(item, int) for item in items):
        return tuple(items)
    named = getattr(kind, "_fields", None) is not None  # the mark of a namedtuple
    return kind(*items) if named else kind(items)


def containers(value: Any) -> list[tuple[int, ...]]:
    """What the lists and dicts in ``value`` hold, by identity: the same unless one is written."""
    kind = class_of(value)
    items: list[Any] = []
    if kind in _DICTS:
        items = list(value.values())
    elif issubclass(kind, (tuple, list)):
        items = list(value)
    own = [tuple(map(id, items))] if items else []
    return own + [held for item in items for held in containers(item)]


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of ``value``."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
