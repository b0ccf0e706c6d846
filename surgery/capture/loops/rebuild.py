"""Put a rewritten function back under the decorators of the original.

A decorator is not run again. Its wrapper is rebuilt around the same code, with the closure cell
that holds the inner function (and ``__wrapped__``) pointing at the new one; all other cells, and
the state they share, stay the wrapper's own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

Function = types.FunctionType


def reachable(function: Function) -> list[Function]:
    """A function and those it wraps: through ``__wrapped__`` and through its closure."""
    found: dict[int, Function] = {}
    queue = [function]
    while queue:
        one = queue.pop()
        if id(one) not in found:
            found[id(one)] = one
            queue += [inner for inner in _inner(one) if isinstance(inner, Function)]
            queue += [
                inner.func
                for inner in _inner(one)
                if type(inner) is functools.partial and isinstance(inner.func, Function)
            ]
    return list(found.values())


def foreign(function: Function) -> Iterator[tuple[Function, Any]]:
    """Objects in the wrappers' closures that hold a function in a way of their own."""
    for one in reachable(function):
        for inner in _inner(one):
            held = getattr(inner, "__wrapped__", None)
            if isinstance(held, Function) and not isinstance(inner, Function | type):
                yield held, inner


def _inner(function: Function) -> Iterator[Any]:
    if "__wrapped__" in function.__dict__:
        yield function.__dict__["__wrapped__"]
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that is still empty
            continue


def rebuild(function: Function, replaced: Mapping[Function, Function]) -> Function:
    """``function`` with the functions it wraps replaced, at any depth."""
    return _Rebuilder(reachable(function), replaced).new(function)


class _Rebuilder:
    def __init__(self, functions: list[Function], replaced: Mapping[Function, Function]) -> None:
        self._replaced = dict(replaced)
        self._changing = set(replaced)
        self._cells: dict[int, types.CellType] = {}
        self._grow(functions)

    def _grow(self, functions: list[Function]) -> None:
        """Every wrapper that leads to a replaced function changes with it."""
        growing = True
        while growing:
            growing = False
            for one in functions:
                if one not in self._changing and any(map(self._changes, _inner(one))):
                    self._changing.add(one)
                    growing = True

    def _changes(self, value: Any) -> bool:
        if type(value) is functools.partial:
            return self._changes(value.func)
        return isinstance(value, Function) and value in self._changing

    def new(self, value: Any) -> Any:
        if not self._changes(value):
            return value
        if type(value) is functools.partial:
            return functools.partial(self.new(value.func), *value.args, **value.keywords)
        if value not in self._replaced:
            self._replaced[value] = copied(value, value.__code__, self._closure(value))
            self._fill(value)
        return self._replaced[value]

    def _closure(self, function: Function) -> tuple[types.CellType, ...]:
        return tuple(self._cell(cell) for cell in function.__closure__ or ())

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # a cell that is still empty
            return cell
        if not self._changes(content):
            return cell
        return self._cells.setdefault(id(cell), types.CellType())

    def _fill(self, function: Function) -> None:
        # After the copy is on record: a wrapper may refer to itself.
        for old in function.__closure__ or ():
            new = self._cells.get(id(old))
            if new is not None:
                new.cell_contents = self.new(old.cell_contents)
        if "__wrapped__" in function.__dict__:
            made = self._replaced[function]
            made.__dict__["__wrapped__"] = self.new(function.__dict__["__wrapped__"])


def copied(
    function: Function, code: types.CodeType, closure: tuple[types.CellType, ...]
) -> Function:
    """The same function with other code or cells."""
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = None if function.__kwdefaults__ is None else {**function.__kwdefaults__}
    made.__annotations__ = {**function.__annotations__}
    made.__qualname__ = function.__qualname__
    made.__module__ = function.__module__
    made.__doc__ = function.__doc__
    made.__dict__.update(function.__dict__)
    return made
