"""What the studies share that train many runs and write a page: arguments, places, tables.

A study trains each of its variants over several seeds, writes numbers as JSON after every run, and
makes its page from those.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery import files
from surgery.train import run as runs
from surgery.train.engine import engine
from surgery.train.logs import RunLog
from surgery.train.loop import Loop
from surgery.train.views import Group, canvas, losses, read_run

ROOT = Path(__file__).resolve().parents[1]

Folders = Mapping[str, Mapping[int, Path]]
"""Variant → seed → folder of a finished run."""


def names_of(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """Reads an argument such as ``one,other`` whose parts are among the known."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; known: {', '.join(known)}"
            )
        return found

    return read


def numbers(text: str) -> list[int]:
    """Reads an argument such as ``0,1,2``."""
    return [int(part) for part in text.split(",")]


@dataclass(frozen=True)
class Place:
    """Where a study leaves what it makes.

    Attributes:
        runs: Folders of runs.
        results: Numbers as JSON.
        page: Made from the numbers.
        images: Of the page.
    """

    runs: Path
    results: Path
    page: Path
    images: Path

    @classmethod
    def named(cls, runs: str, script: str, page: str) -> Place:
        """Of the study whose script, such as ``__file__``, is given."""
        docs = ROOT / "docs"
        return cls(
            ROOT / "runs" / runs, Path(script).parent / "results", docs / page, docs / "images"
        )

    def of(self, steps: int | None) -> Place:
        """For runs of so many steps: those of a trial never go into the documentation."""
        if steps is None:
            return self
        trial = self.runs / "trial"
        return Place(self.runs, trial, trial / self.page.name, trial / "images")


@contextlib.contextmanager
def started(job: runs.Job[Any]) -> Iterator[Loop]:
    """The loop of a run that stands before its first step, in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder, engine(job.config) as accelerator:
        loop = runs.assembled(job, accelerator, job.data(), out=Path(folder))
        with RunLog(Path(folder), tensorboard=False) as loop.log:
            loop.start(0)
            yield loop


def machine() -> dict[str, Any]:
    """What was measured on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write numbers, in whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(data, indent=1) + "\n")


def draw_losses(folders: Folders, path: Path) -> None:
    """Loss curves of all runs, a colour for each variant."""
    together = [
        Group(variant, tuple(read_run(folder) for folder in found.values()))
        for variant, found in folders.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(losses.curves(together), path)


def markdown(
    columns: Mapping[str, str], rows: Sequence[Mapping[str, str]], variants: Sequence[str]
) -> str:
    """A table with a line for every variant: what was not run says so.

    Args:
        columns: Key in a row → heading; the first names the variant.
        rows: Of the variants that were run, as text.
        variants: All of them, in their order.
    """
    by_name = {row["name"]: row for row in rows}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for variant in variants:
        cells = [variant, *["not run"] * (len(columns) - 1)]
        if (row := by_name.get(variant)) is not None:
            cells = [row[key] for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def busy(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Which times say little."""
    count = sum("busy" in note for note in comparison["notes"])
    runs = sum(
        len(row["metrics"].get("loss", {"values": {}})["values"]) for row in comparison["rows"]
    )
    if count:
        yield (
            f"The machine had other work during {count} of these {runs} runs, so that the times "
            "say little.\n"
        )
