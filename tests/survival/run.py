"""The survival table: every row on every model, each cell in a process of its own.

    python -m tests.survival.run                              # everything: results and the page
    python -m tests.survival.run --only Llama,BERT --rows eager,compile
    python -m tests.survival.run --columns "ancre,denseformer"
    python -m tests.survival.run --stock                      # the unmodified models alone

Each row runs on the unmodified model first. A cell of a rewritten model that fails is excused if
the unmodified model fails the same row, and named after that cause; otherwise it is a FAIL, and
the command exits with 1. A partial run replaces its own cells in the results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.survival.models import NAMED, Subject
from tests.survival.page import PAGE, RESULTS, Cell, load, page
from tests.survival.reference import COLUMNS, MAIN, RESIDUAL
from tests.survival.rows import BY_KEY, ROWS, Row
from tests.survival.upstream import UPSTREAM
from tests.survival.worker import Outcome, work


@dataclass
class Job:
    """One cell to run: first on the stock model, then rewritten."""

    model: str
    column: str | None
    row: str
    stock: Outcome = field(default_factory=Outcome)


def cells(
    subjects: Iterable[Subject], columns: Iterable[str], rows: Iterable[Row]
) -> Iterator[Job]:
    """Every cell of the table, row after row."""
    chosen = list(subjects)
    names = list(columns)
    for row in rows:
        for subject in chosen:
            if not row.applies(subject):
                continue
            for name in names:
                if name == MAIN.name or (row.reduced and subject.name in RESIDUAL):
                    yield Job(subject.name, name, row.key)


def cell_of(job: Job, done: Outcome) -> Cell:
    """The cell that a run of a rewritten model makes, given how the unmodified one did.

    An excuse has to be on the list of ``upstream.py`` and to be what the unmodified model raised.
    """
    status, cause = "pass", ""
    if done.error:
        known = UPSTREAM.get((job.model, job.row))
        excused = known is not None and known.raised in job.stock.error
        status = "excused" if excused else "FAIL"
        cause = known.cause if known is not None and excused else done.error
        if job.stock.error and not excused:
            cause = f"{cause} (the unmodified model: {job.stock.error})"
    notes = {**done.notes, **({"stock": job.stock.notes} if job.stock.notes else {})}
    return Cell(job.model, job.column or "", job.row, status, cause, done.seconds, notes)


class Pool:
    """A few processes at a time, forked from a server that has imported everything."""

    def __init__(self, workers: int) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.survival.preload"])
        self.workers = workers
        self.running: dict[Connection, tuple[Job, BaseProcess, float]] = {}

    def run(self, todo: deque[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Outcomes as they come; jobs may be added to ``todo`` meanwhile."""
        while todo or self.running:
            while todo and len(self.running) < self.workers:
                self._start(todo.popleft())
            ready = wait(list(self.running), timeout=1)
            for connection in ready:
                if isinstance(connection, Connection):
                    yield self._finish(connection)
            for connection, (_, _, until) in list(self.running.items()):
                if time.monotonic() > until:
                    yield self._cut_off(connection)

    def _start(self, job: Job) -> None:
        mine, theirs = self.context.Pipe(duplex=False)
        given = (job.model, job.column, job.row, job.stock.notes, theirs)
        process = self.context.Process(target=work, args=given)
        process.start()
        theirs.close()
        self.running[mine] = (job, process, time.monotonic() + BY_KEY[job.row].seconds)

    def _finish(self, connection: Connection) -> tuple[Job, Outcome]:
        job, process, _ = self.running.pop(connection)
        try:
            outcome = connection.recv()
        except EOFError:
            process.join()
            outcome = Outcome(error=f"the process died with exit code {process.exitcode}")
        self._end(process)
        return job, outcome

    def _cut_off(self, connection: Connection) -> tuple[Job, Outcome]:
        job, process, _ = self.running.pop(connection)
        self._end(process)
        return job, Outcome(error="it did not end in its time")

    def _end(self, process: BaseProcess) -> None:
        process.join(1)
        if process.pid is not None:
            # The group: what a row started itself goes too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()


def run_cells(jobs: list[Job], options: argparse.Namespace) -> Iterator[tuple[Cell, Outcome]]:
    """Run the unmodified model of each row, then its rewritten ones."""
    waiting: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        waiting.setdefault((job.model, job.row), []).append(job)
    todo = deque(jobs if options.rewritten else [Job(m, None, row) for m, row in waiting])
    for job, outcome in Pool(options.workers).run(todo):
        if job.column is not None:
            yield cell_of(job, outcome), outcome
            continue
        if outcome.error or options.stock:
            _say(job.model, "(unmodified)", job.row, outcome.error, outcome.seconds)
        if not options.stock:
            held = [replace(each, stock=outcome) for each in waiting[job.model, job.row]]
            todo.extendleft(reversed(held))


def main() -> None:
    """Run the cells that are asked for and write the results and the page."""
    options = _options()
    subjects = [NAMED[name] for name in options.only]
    jobs = list(cells(subjects, options.columns, [BY_KEY[key] for key in options.rows]))
    began = time.monotonic()
    done: list[Cell] = []
    signal.signal(signal.SIGTERM, _stop)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            os.environ["SURVIVAL_MODELS"] = ",".join(options.only)
            for cell, outcome in run_cells(jobs, options):
                done.append(cell)
                said = f"{cell.status} {cell.cause}"
                _say(cell.model, cell.column, cell.row, said, cell.seconds)
                if cell.status == "FAIL" and options.failures:
                    _note(Path(options.failures), cell, outcome)
    finally:
        if done and not options.rewritten:
            whole = options.complete and len(done) == len(jobs)
            _write(done, time.monotonic() - began, complete=whole)
    failed = [cell for cell in done if cell.status == "FAIL"]
    print(f"{len(done)} cells, {len(failed)} failed")  # noqa: T201  the summary of a command
    sys.exit(bool(failed))


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the writing off
    sys.exit("stopped; what is done is kept")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=_names(NAMED), default=list(NAMED))
    parser.add_argument("--rows", type=_names(BY_KEY), default=[row.key for row in ROWS])
    parser.add_argument("--columns", type=_names(COLUMNS), default=list(COLUMNS), metavar="A;B")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stock", action="store_true", help="the unmodified models alone")
    parser.add_argument("--rewritten", action="store_true", help="without the unmodified models")
    parser.add_argument("--failures", help="a file to append the tracebacks of failures to")
    options = parser.parse_args()
    everything = (list(NAMED), [row.key for row in ROWS], list(COLUMNS))
    options.complete = (options.only, options.rows, options.columns) == everything
    return options


def _names(known: Iterable[str]) -> Any:
    by_lower = {name.lower(): name for name in known}

    def parse(text: str) -> list[str]:
        asked = [part.strip().lower() for part in text.split(";" if ";" in text else ",")]
        if not text.strip():
            return list(by_lower.values())
        unknown = [name for name in asked if name not in by_lower]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {list(by_lower.values())}")
        return [by_lower[name] for name in asked]

    return parse


def _say(model: str, column: str, row: str, text: str, seconds: float) -> None:
    print(f"{model:22}{column:20}{row:26}{seconds:7.1f} s  {text[:150]}", flush=True)  # noqa: T201


def _note(file: Path, cell: Cell, outcome: Outcome) -> None:
    with file.open("a") as stream:
        stream.write(f"\n## {cell.model} · {cell.column} · {cell.row}\n{outcome.trace}\n")


def _write(done: list[Cell], seconds: float, *, complete: bool) -> None:
    """Replace the cells that ran; a complete run replaces everything."""
    import torch

    before = load() if RESULTS.exists() and not complete else None
    kept = {cell.key: cell for cell in (before.cells if before else [])}
    kept |= {cell.key: cell for cell in done}
    order = [(j.model, j.column, j.row) for j in cells(NAMED.values(), COLUMNS, ROWS)]
    rows = [asdict(kept[key]) for key in order if key in kept]
    result = {
        "versions": _versions() if before is None else before.versions,
        "seconds": round(seconds) if before is None else before.seconds,
        "threads": torch.get_num_threads(),
        "cells": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(load()))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "diffusers", "timm", "onnxruntime")
    return {name: version(name).partition("+")[0] for name in packages}


if __name__ == "__main__":
    main()
