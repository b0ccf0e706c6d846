"""Runs a trace again with other options when torch or a library refused a symbolic number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

from surgery.capture.tracing import Options
from surgery.capture.values import UnhashableSymbol
from surgery.errors import CaptureError

T = TypeVar("T")


def settle(trace: Callable[[Options], T], options: Options) -> T:
    """``trace(options)``, with the first options under which it gets through.

    Raises:
        CaptureError: no options help.
    """
    while True:
        try:
            return trace(options)
        except CaptureError as error:
            better = _better(options, error)
            if better == options:
                raise
            options = better


def _better(options: Options, error: CaptureError) -> Options:
    for cause in _causes(error):
        if isinstance(cause, UnhashableSymbol):
            return dataclasses.replace(options, hash_symbols=True)
        if isinstance(cause, TypeError) and "not SymbolicBool" in str(cause):
            return dataclasses.replace(options, plain_bools=True)
        if isinstance(cause, TypeError) and "not Symbolic" in str(cause):
            return dataclasses.replace(options, plain_numbers=True)
        if isinstance(cause, KeyError):
            return dataclasses.replace(options, keep_caches=True)
    return options


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
