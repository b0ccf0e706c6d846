"""Whose stock forward is being captured in this thread."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator

_capturing: contextvars.ContextVar[frozenset[type]] = contextvars.ContextVar(
    "_capturing", default=frozenset()
)


@contextlib.contextmanager
def captures(mixin: type) -> Generator[None]:
    """Inside, the forward beneath a driver's ``mixin`` is being captured."""
    token = _capturing.set(_capturing.get() | {mixin})
    try:
        yield
    finally:
        _capturing.reset(token)


def capturing() -> frozenset[type]:
    """The mixins of the drivers that are being captured."""
    return _capturing.get()
