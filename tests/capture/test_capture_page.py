"""The code of ``docs/capture.md`` runs, and generates the forward that the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "capture.md"


def test_the_page_runs_and_shows_what_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = "\n".join(text for language, text in blocks if language == "python")
    exec(compile(code, PAGE.name, "exec"), {"__name__": PAGE.name})  # noqa: S102 - our own page
    (shown,) = [text for language, text in blocks if language == "text"]
    assert shown in capsys.readouterr().out
