from __future__ import annotations

import io
import json
import logging
import re
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from surgery import errors, progress
from surgery.terminal import FAILED, INTERNAL, INTERRUPTED, USAGE, Bars, Session

ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.SurgeryError)
]


def test_every_error_class_has_its_own_exit_code():
    codes = [each.exit_code for each in ERRORS if each is not errors.SurgeryError]
    assert len(codes) >= 9
    assert len({*codes, 0, FAILED, USAGE, INTERNAL, INTERRUPTED}) == len(codes) + 5


def test_the_documented_exit_codes_are_the_real_ones(root: Path):
    page = (root / "docs" / "cli.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| (\d+) \| ?(SRG-\w+)? \|", page, flags=re.MULTILINE))
    named = {str(kind.exit_code): kind.code for kind in ERRORS if kind is not errors.SurgeryError}
    others = (0, FAILED, USAGE, INTERNAL, INTERRUPTED)
    assert documented == {**named, **{str(code): "" for code in others}}


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_is_told_with_code_and_hint(
    kind: type[errors.SurgeryError], capsys: pytest.CaptureFixture[str]
):
    code = Session().failed(kind("rank 0 received, 1 or more expected", hint="raise [rank]"))
    shown = capsys.readouterr()
    assert code == kind.exit_code
    assert shown.out == ""
    assert shown.err == (
        f"error[{kind.code}]: rank 0 received, 1 or more expected\n  hint: raise [rank]\n"
    )


def test_a_bug_asks_for_debug(capsys: pytest.CaptureFixture[str]):
    assert Session().failed(KeyError("q")) == INTERNAL
    shown = capsys.readouterr().err
    assert shown.startswith("internal error: KeyError: 'q'")
    assert "--debug" in shown


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]):
    try:
        raise KeyError("q")
    except KeyError as error:
        Session(debug=True).failed(error)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_piped_table_keeps_every_character(capsys: pytest.CaptureFixture[str]):
    path = "model." + "layers.0.self_attention." * 20 + "q_proj"
    table = Table("site", "why")
    table.add_row(path, "x" * 150)
    Session().result(table, None)
    shown = capsys.readouterr().out
    assert path in shown
    assert "x" * 150 in shown
    assert "\x1b" not in shown


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]):
    session = Session(as_json=True)
    with session.running():
        print("a library prints")
        logging.getLogger("surgery.rules").warning("25 of 30 layers")
    session.result("a table", {"sites": 3})
    session.note("saved")
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"sites": 3}
    assert "a library prints" in shown.err
    assert "25 of 30 layers" in shown.err
    assert "saved" in shown.err


def test_quiet_leaves_results_and_errors(capsys: pytest.CaptureFixture[str]):
    session = Session(quiet=True)
    with session.running():
        logging.getLogger("surgery.rules").warning("25 of 30 layers")
        logging.getLogger("surgery.rules").error("disk is full")
    session.note("saved")
    session.result("3 sites", None)
    shown = capsys.readouterr()
    assert shown.out == "3 sites\n"
    assert "disk is full" in shown.err
    assert "25 of 30" not in shown.err
    assert "saved" not in shown.err


def test_quiet_silences_other_libraries_and_ends(capsys: pytest.CaptureFixture[str]):
    other = logging.getLogger("some.library")
    with Session(quiet=True).running():
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        assert not other.isEnabledFor(logging.WARNING)
        assert other.isEnabledFor(logging.ERROR)
    assert other.isEnabledFor(logging.WARNING)
    assert capsys.readouterr().err == ""


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]):
    data = {"worst": float("nan"), "rows": [(1.5, float("-inf")), None, 3, "x"]}
    Session(as_json=True).result("", data)
    read = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert read == {"worst": "nan", "rows": [[1.5, "-inf"], None, 3, "x"]}


def draw(seconds: float, *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100)
    with (
        Bars(console, shown=True) as bars,
        progress.listen(bars),
        progress.task("writing shards", total=4_000_000_000, unit="bytes") as task,
    ):
        task.advance(1_000_000_000)
        time.sleep(seconds)
    return stream.getvalue()


def test_a_long_task_is_drawn_on_a_terminal():
    shown = draw(1.0, terminal=True)
    assert "writing shards" in shown
    assert "1.00/4.00 GB" in shown


def test_a_short_task_is_not_drawn():
    assert "writing shards" not in draw(0.0, terminal=True)


def test_nothing_is_drawn_off_a_terminal():
    assert draw(1.0, terminal=False) == ""
