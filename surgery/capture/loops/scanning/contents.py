"""What blocks there are in what an expression may stand for."""

from __future__ import annotations

from surgery.capture.loops.driver import Driver
from surgery.capture.loops.values import NOTHING, Value, flatten


class Contents:
    """Answers for the values of one driver's functions."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def containers(self, value: Value) -> frozenset[str]:
        """The containers whose blocks can be got out of a value."""
        known = frozenset(self._driver.members)
        found = [inner.runnable | (inner.paths & known) for inner in flatten(value)]
        return frozenset[str]().union(*found)

    def holds(self, value: Value) -> bool:
        """Whether a block can be got out of a value."""
        return value != NOTHING and bool(self.containers(value))

    def leads(self, value: Value) -> bool:
        """Whether a value holds a block, or a module in which there are some."""
        inner = [path for one in flatten(value) for path in one.paths]
        return self.holds(value) or any(path and self._driver.below(path) for path in inner)

    def matters(self, value: Value) -> bool:
        """Whether a value leads to a block, or is a function that may run one."""
        return self.leads(value) or any(inner.functions for inner in flatten(value))


def is_module(value: Value) -> bool:
    """A module that is no block: handing it on runs its own forward, which is rewritten itself."""
    return bool(value.paths) and not any(
        inner.runnable or inner.functions for inner in flatten(value)
    )
