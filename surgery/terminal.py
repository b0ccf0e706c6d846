"""How the command line speaks: results on stdout, everything else on stderr.

A result that is piped stays whole: off a terminal nothing is wrapped, cut or coloured.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Self, TextIO, cast

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from surgery import files, progress
from surgery.errors import SurgeryError

#: Exit codes beside those of the error classes.
OK, FAILED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 70, 130

# Off a terminal there is no width to fit into: a path must never be folded or cut.
_UNBOUNDED = 100_000
_SECONDS_BEFORE_BARS = 0.5


class Session:
    """One run of the command line.

    Args:
        as_json: Print results as JSON, and nothing else on stdout.
        quiet: Print results and errors only.
        debug: Show tracebacks and debug messages.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.debug = debug
        self._results = sys.stdout
        self._messages = Console(file=sys.stderr, soft_wrap=not sys.stderr.isatty())

    @property
    def interactive(self) -> bool:
        """Whether messages go to a terminal, where bars are drawn."""
        return self._messages.is_terminal

    def result(self, shown: RenderableType, data: Any) -> None:
        """Print a result: ``shown`` to a person, ``data`` to a machine."""
        if self.as_json:
            self._results.write(_as_json(data) + "\n")
            return
        _result_console(self._results).print(shown)

    def write_json(self, path: Path, data: Any) -> None:
        """Write ``data`` to a file as JSON."""
        files.write(path, _as_json(data) + "\n")

    def note(self, text: str) -> None:
        """Say what happened, unless asked to be quiet."""
        if not self.quiet:
            self._messages.print(Text(text))

    def failed(self, error: BaseException) -> int:
        """Tell an error and return the exit code that stands for it."""
        if self.debug:
            self._messages.print(Text("".join(traceback.format_exception(error)).rstrip()))
        if isinstance(error, SurgeryError):
            self._tell(f"error[{error.code}]", str(error))
            return error.exit_code
        if isinstance(error, KeyboardInterrupt):
            self._tell("interrupted", "nothing more was written")
            return INTERRUPTED
        if isinstance(error, OSError):
            self._tell("error", str(error))
            return FAILED
        self._tell("internal error", f"{type(error).__name__}: {error}")
        if not self.debug:
            self._messages.print(Text("  hint: run again with --debug for the traceback"))
        return INTERNAL

    def _tell(self, what: str, text: str) -> None:
        self._messages.print(Text.assemble((what, "bold red"), ": ", text))

    @contextmanager
    def running(self) -> Generator[None]:
        """Route what happens inside: log and stray prints to stderr, progress to bars."""
        # Libraries print; stdout belongs to the result.
        with (
            _silence() if self.quiet else nullcontext(),
            _logging(self._messages, logging.DEBUG if self.debug else logging.WARNING),
            redirect_stdout(sys.stderr),
            Bars(self._messages, shown=not self.quiet) as bars,
            progress.listen(bars),
        ):
            yield


class Bars:
    """Draws progress bars for tasks that take longer than half a second.

    Nothing is drawn off a terminal.
    """

    def __init__(self, console: Console, *, shown: bool) -> None:
        self._shown = shown and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Amount(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._ids: dict[progress.Task, TaskID] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if self._shown:
            self._timer = threading.Timer(_SECONDS_BEFORE_BARS, self._progress.start)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._progress.stop()

    def started(self, task: progress.Task) -> None:
        """Add a bar."""
        self._ids[task] = self._progress.add_task(
            task.title, total=task.total, unit=task.unit, note=""
        )

    def advanced(self, task: progress.Task) -> None:
        """Move it."""
        self._progress.update(self._ids[task], completed=task.done, note=task.note)

    def finished(self, task: progress.Task) -> None:
        """Remove it."""
        self._progress.remove_task(self._ids.pop(task))


class _Amount(ProgressColumn):
    """``3/12``, or ``0.5/2.1 GB``; nothing when the total is unknown."""

    def render(self, task: Any) -> Text:
        if task.total is None:
            return Text("")
        if task.fields["unit"] == "bytes":
            return Text(f"{task.completed / 1e9:.2f}/{task.total / 1e9:.2f} GB")
        return Text(f"{int(task.completed)}/{int(task.total)}")


@contextmanager
def _logging(console: Console, level: int) -> Generator[None]:
    logger = logging.getLogger("surgery")
    handler = RichHandler(console=console, show_time=False, show_path=False, level=level)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _as_json(data: Any) -> str:
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: they become the strings ``"nan"``, ``"inf"``, ``"-inf"``."""
    if isinstance(data, float):
        return data if math.isfinite(data) else str(data)
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in cast("dict[str, Any]", data).items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in cast("list[Any]", data)]
    return data


@contextmanager
def _silence() -> Generator[None]:
    """Errors only, from every library and not only from this one."""
    # Read by huggingface_hub, transformers and diffusers when they are first imported.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _result_console(stream: TextIO) -> Console:
    if stream.isatty():
        return Console(file=stream)
    return Console(file=stream, width=_UNBOUNDED, soft_wrap=True)
