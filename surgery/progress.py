"""Progress of long operations, told to whoever listens.

The library reports, the command line draws, and a program that embeds the library may listen
too. With no listener a report costs one attribute check::

    with progress.task("writing", total=nbytes, unit="bytes") as task:
        for shard in shards:
            task.advance(write(shard))

    with progress.listen(bars):      # any object with the three methods of Listener
        surgery.save(model, "out/")
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")
Unit = Literal["items", "bytes"]


class Listener(Protocol):
    """What a listener implements. Methods may be called from any thread."""

    def started(self, task: Task) -> None:
        """A task begins."""
        ...

    def advanced(self, task: Task) -> None:
        """``task.done`` has grown."""
        ...

    def finished(self, task: Task) -> None:
        """A task ends, completed or not."""
        ...


_listener: ContextVar[Listener | None] = ContextVar("surgery_progress_listener", default=None)


class Task:
    """One long operation.

    Attributes:
        title: What is being done, in a few words.
        total: How many units there are, or None when nobody knows.
        unit: What is counted.
        done: How many units are done.
        note: What else there is to say while it runs, such as the loss.
    """

    __slots__ = ("_listener", "done", "note", "title", "total", "unit")

    def __init__(
        self, title: str, total: int | None, unit: Unit, listener: Listener | None
    ) -> None:
        self.title = title
        self.total = total
        self.unit: Unit = unit
        self.done = 0
        self.note = ""
        # Held, not looked up: a worker thread does not inherit the context of its parent.
        self._listener = listener

    def advance(self, amount: int = 1) -> None:
        """Count ``amount`` more units as done."""
        self.done += amount
        if self._listener is not None:
            self._listener.advanced(self)


@contextmanager
def listen(listener: Listener) -> Generator[None]:
    """Send every task started in this context to ``listener``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def task(title: str, total: int | None = None, unit: Unit = "items") -> Generator[Task]:
    """Report a long operation as it runs.

    Args:
        title: What is being done, in a few words.
        total: How many units there are, or None when nobody knows.
        unit: What is counted.
    """
    listener = _listener.get()
    current = Task(title, total, unit, listener)
    if listener is None:
        yield current
        return
    listener.started(current)
    try:
        yield current
    finally:
        listener.finished(current)


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items``, reporting each as done once the loop body is through with it."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(title, total) as current:
        for item in items:
            yield item
            current.advance()
