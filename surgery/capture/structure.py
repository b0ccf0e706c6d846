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


def containers(value: Any) -> list[tuple[Any, tuple[int, ...]]]:
    """The lists and dicts in ``value`` and what each holds, by identity."""
    kind = class_of(value)
    if kind is not dict and not issubclass(kind, (tuple, list)):
        return []
    items: list[Any] = list(value.values()) if kind is dict else list(value)
    own: list[tuple[Any, tuple[int, ...]]] = []
    if kind in (list, dict):
        own = [(value, tuple(map(id, items)))]
    return own + [held for item in items for held in containers(item)]


def seal(container: Any, item: Any) -> None:
    """Put ``item`` in the place of everything a list or dict holds."""
    if class_of(container) is dict:
        container.update(dict.fromkeys(container, item))
    else:
        container[:] = [item] * (len(container) + 1)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of ``value``."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
