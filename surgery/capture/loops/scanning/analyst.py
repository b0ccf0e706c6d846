"""Scans the functions of one driver, each once."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from surgery.capture.loops.driver import Driver
from surgery.capture.loops.findings import Findings
from surgery.capture.loops.scanning.scan import Scan
from surgery.capture.loops.source import NoSource, source_of
from surgery.capture.loops.values import Value, items_of

_DEPTH = 4


class Analyst:
    """Scans the functions of one driver; remembers what it found."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._known: dict[tuple[Any, ...], Findings | None] = {}
        self._methods: dict[types.CodeType, Findings] = {}
        self._depth = 0

    def method(self, function: types.FunctionType) -> Findings:
        """What a method does, ``self`` being the driver.

        Raises:
            NoSource: its text is not to be had.
        """
        if function.__code__ not in self._methods:
            arguments = {0: Value(paths=frozenset({""}))}
            scan = Scan(self, function, source_of(function), {})
            self._methods[function.__code__] = scan.run(arguments)
        return self._methods[function.__code__]

    def known(self) -> Iterable[Findings]:
        """What the methods scanned so far do."""
        return self._methods.values()

    def given(
        self,
        function: types.FunctionType,
        arguments: dict[int, Value],
        constants: dict[str, bool] | None = None,
    ) -> Findings | None:
        """What a function does with the blocks it is given; None if that cannot be told.

        Args:
            function: A Python function.
            arguments: What its parameters stand for, by position.
            constants: Parameters known to be true or false in this call.
        """
        known = tuple(sorted((constants or {}).items()))
        key = (function.__code__, tuple(sorted(arguments.items(), key=_position)), known)
        if key not in self._known:
            self._known[key] = None
            if self._depth < _DEPTH:
                self._known[key] = self._try(function, arguments, constants or {})
        return self._known[key]

    def is_sequence(
        self, function: types.FunctionType, items: Value, constants: dict[str, bool]
    ) -> bool:
        """Whether a function runs the items of its first argument one after the other."""
        found = self.given(function, {0: items_of(items)}, constants)
        if found is None or not found.runs_blocks():
            return False
        return all(trouble.inside for trouble in found.troubles.values() if trouble.runs)

    def _try(
        self, function: types.FunctionType, arguments: dict[int, Value], constants: dict[str, bool]
    ) -> Findings | None:
        self._depth += 1
        try:
            return Scan(self, function, source_of(function), constants).run(arguments)
        except NoSource:
            return None
        finally:
            self._depth -= 1


def _position(item: tuple[int, Value]) -> int:
    return item[0]
