"""`surgery plot`: reads run folders and writes every picture there is something to draw for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import progress
from surgery.errors import TrainingError
from surgery.train.views import canvas, graph, losses, matrices, movie, sources
from surgery.train.views.canvas import Figure, Format
from surgery.train.views.equal import Saving, savings
from surgery.train.views.movie import Animation
from surgery.train.views.runs import REWIRES_NOTHING, Record, groups, read_run

if TYPE_CHECKING:
    from rich.console import Group as Renderables

logger = logging.getLogger(__name__)

PLOTS = "plots"


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        files: The pictures.
        savings: Steps to equal loss of every configuration against the first.
        notes: What the runs lacked, each with its folder.
    """

    files: tuple[Path, ...]
    savings: tuple[Saving, ...]
    notes: tuple[str, ...]

    def view(self) -> Renderables:
        """As a table of savings and a list of files."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        if self.savings:
            table = Table("run", "seed", f"steps to the loss of {self.savings[0].baseline}")
            for saving in self.savings:
                for reach in saving.runs:
                    table.add_row(Text(saving.name), str(reach.seed), Text(str(reach)))
                if len(saving.runs) != 1:
                    table.add_row(Text(saving.name), "all", Text(str(saving)))
            parts.append(table)
        return Group(*parts, *(Text(str(file)) for file in self.files))

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "files": [str(file) for file in self.files],
            "savings": [saving.to_dict() for saving in self.savings],
            "notes": list(self.notes),
        }


def draw(
    paths: Sequence[Path | str],
    *,
    out: Path | None = None,
    form: Format = "png",
    animation: Animation = "gif",
    threshold: float = graph.THRESHOLD,
) -> Drawn:
    """Draw one run or several.

    Args:
        paths: Run folders; the first is the baseline that the others are compared with.
        out: Where the pictures go. By default those of one run to ``plots/`` inside its folder,
            and the comparison to ``plots/`` in the folder that the runs have in common.
        form: Of the pictures that do not move.
        animation: Of the one that does.
        threshold: Smallest magnitude of a coefficient that the graph shows.

    Raises:
        TrainingError: a run is missing or holds nothing to draw, or matplotlib is not installed.
    """
    _check(paths, threshold)
    records = [read_run(Path(path)) for path in paths]
    together = groups(records)
    for record in records:
        _tell(record)
    notes = tuple(f"{record.path}: {note}" for record in records for note in record.notes)
    files: list[Path] = []
    for record in progress.track(records, "drawing"):
        files += _draw_run(record, _home(record, records, out), form, animation, threshold)
    if len(records) > 1:
        folder = _common(records) if out is None else out
        files.append(canvas.save(losses.curves(together), folder / f"losses.{form}"))
    return Drawn(tuple(files), tuple(savings(together)), notes)


def _check(paths: Sequence[Path | str], threshold: float) -> None:
    if not paths:
        raise TrainingError("no run was given", hint="name one run folder or several")
    if threshold < 0:
        raise TrainingError(f"the threshold of the graph is {threshold}, expected 0 or more")


def _tell(record: Record) -> None:
    """Log the notes of a run. That rules which rewire nothing left no matrix is no warning."""
    for note in record.notes:
        level = logging.INFO if note == REWIRES_NOTHING else logging.WARNING
        logger.log(level, "%s: %s", record.path, note)


def _home(record: Record, records: Sequence[Record], out: Path | None) -> Path:
    """Where the pictures of one run go."""
    if out is None:
        return record.path / PLOTS
    if len(records) == 1:
        return out
    # Below one folder, as far apart as the runs are.
    return out / record.path.resolve().relative_to(_above(records))


def _above(records: Sequence[Record]) -> Path:
    return Path(os.path.commonpath([record.path.resolve().parent for record in records]))


def _common(records: Sequence[Record]) -> Path:
    return _above(records) / PLOTS


def _draw_run(
    record: Record, folder: Path, form: Format, animation: Animation, threshold: float
) -> list[Path]:
    has_losses = len(record.train) or len(record.evaluation)
    if not has_losses and not record.frames:
        raise TrainingError(
            f"{record.path} holds nothing to draw: no step was logged and no matrix recorded",
            hint="; ".join(record.notes),
        )
    files = [
        canvas.save(figure, folder / f"{name}.{form}")
        for name, figure in _figures(record, threshold)
    ]
    if record.frames and len(record.frames[0].steps) > 1:
        pictures = list(matrices.animated(record.frames, record.total))
        files.append(movie.write(pictures, folder / f"matrices.{animation}"))
    return files


def _figures(record: Record, threshold: float) -> Iterator[tuple[str, Figure]]:
    if len(record.train) or len(record.evaluation):
        yield "losses", losses.curves(groups([record]))
    if not record.frames:
        return
    yield "matrices", matrices.at_the_end(record.frames)
    yield "graph", graph.at_the_end(record.frames, threshold)
    if len(record.frames[0].steps) > 1:
        yield "matrices-over-time", matrices.over_time(record.frames)
        yield "sources", sources.over_time(record.frames)
