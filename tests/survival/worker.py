"""One cell in a process of its own."""

from __future__ import annotations

import os
import re
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.survival.calls import Case
from tests.survival.models import NAMED
from tests.survival.reference import COLUMNS
from tests.survival.rows import BY_KEY


@dataclass
class Outcome:
    """How one run of a row ended.

    Attributes:
        error: Empty if it passed; else the class and first line of what was raised.
        trace: The end of the traceback.
        seconds: Of processor time, of this process and those it started.
        notes: What the row measured.
    """

    error: str = ""
    trace: str = ""
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict[str, Any])


def attempt(model: str, column: str | None, row: str, stock: dict[str, Any]) -> Outcome:
    """Run one row on one model, rewritten by ``column`` or as it is, in this process."""
    case = Case(NAMED[model], None if column is None else COLUMNS[column], stock)
    began = _processor_time()
    outcome = Outcome()
    try:
        outcome.notes = BY_KEY[row].check(case)
    except Exception as error:  # noqa: BLE001  a cell reports whatever happens in it
        outcome.error = first_line(error)
        outcome.trace = "".join(traceback.format_exception(error)[-40:])[-9000:]
    outcome.seconds = round(_processor_time() - began, 2)
    return outcome


def _processor_time() -> float:
    return sum(os.times()[:4])


def first_line(error: BaseException) -> str:
    """The class and the first line of what an error goes back to, without paths and addresses."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    text = re.sub(r"(/[\w.+-]+)+/|\x1b\[\d+m", "", text)
    return re.sub(r"0x[0-9a-f]+", "0x…", text)[:300]


def work(model: str, column: str | None, row: str, stock: dict[str, Any], to: Connection) -> None:
    """What a forked process does: one cell, its outcome sent back."""
    os.setsid()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # other libraries' advice; a row raises what it minds
    to.send(attempt(model, column, row, stock))
    to.close()
