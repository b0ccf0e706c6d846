"""What an expression of a driver may stand for, as far as blocks are concerned.

Values are joined, never narrowed: a name that holds a block on one path and a tensor on another
counts as a block. That errs on the safe side, since the runtime leaves alone whatever is not a
block of its stack.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, replace

_NONE: frozenset[str] = frozenset()
_DEPTH = 4
LocalFunction = ast.FunctionDef | ast.Lambda


@dataclass(frozen=True, slots=True)
class Value:
    """What an expression may be; several of these at once when paths join.

    Attributes:
        paths: Modules by dotted path from the driver ("" for the driver itself).
        blocks: A block of these containers.
        bound: ``block.forward``, ``block.__call__``, or a `functools.partial` of a block.
        part: Something that belongs to a block of these containers: an attribute, an item, what
            wraps it.
        items: What iteration gives.
        fields: The entries of a tuple of known length.
        functions: Functions and lambdas defined inside the method.
        own: Methods of the driver, by name.
    """

    paths: frozenset[str] = _NONE
    blocks: frozenset[str] = _NONE
    bound: frozenset[str] = _NONE
    part: frozenset[str] = _NONE
    items: Value | None = None
    fields: tuple[Value, ...] | None = None
    functions: frozenset[LocalFunction] = frozenset()
    own: frozenset[str] = _NONE

    @property
    def runnable(self) -> frozenset[str]:
        """The containers of which a call of this value would run a block."""
        return self.blocks | self.bound


NOTHING = Value()


def tuple_of(*fields: Value) -> Value:
    """A tuple of known length; nothing if no entry matters."""
    return NOTHING if all(field == NOTHING for field in fields) else Value(fields=fields)


def items_of(element: Value) -> Value:
    """An iterable of ``element``; nested at most a few deep, so that joins come to an end."""
    if element == NOTHING or _depth(element) >= _DEPTH:
        return NOTHING
    return Value(items=element)


def _depth(value: Value) -> int:
    inner = [*(value.fields or ()), *([] if value.items is None else [value.items])]
    return 1 + max((_depth(entry) for entry in inner), default=0)


def join(*values: Value) -> Value:
    """What may be any of ``values``."""
    found = NOTHING
    for value in values:
        found = _join(found, value)
    return found


def _join(left: Value, right: Value) -> Value:
    if right in (left, NOTHING):
        return left
    if left == NOTHING:
        return right
    fields, items = left.fields or right.fields, _join_items(left.items, right.items)
    if left.fields is not None and right.fields is not None:
        if len(left.fields) == len(right.fields):
            fields = tuple(_join(a, b) for a, b in zip(left.fields, right.fields, strict=True))
        else:
            fields = None
            items = _join_items(items, join(*left.fields, *right.fields))
    return Value(
        left.paths | right.paths,
        left.blocks | right.blocks,
        left.bound | right.bound,
        left.part | right.part,
        items,
        fields,
        left.functions | right.functions,
        left.own | right.own,
    )


def _join_items(left: Value | None, right: Value | None) -> Value | None:
    if left is None or right is None:
        return left or right
    return _join(left, right)


def without_parts(value: Value) -> Value:
    """The value, forgetting what only belongs to a block."""
    return replace(
        value,
        part=_NONE,
        items=None if value.items is None else without_parts(value.items),
        fields=None if value.fields is None else tuple(map(without_parts, value.fields)),
    )


def flatten(value: Value) -> Iterable[Value]:
    """The value and everything inside it."""
    yield value
    for entry in (*(value.fields or ()), *([] if value.items is None else [value.items])):
        yield from flatten(entry)
