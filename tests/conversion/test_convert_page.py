"""The code of ``docs/convert.md`` runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), PAGE.name, "exec"), {"__name__": PAGE.name})  # noqa: S102 - our own page
    assert "saved model" in capsys.readouterr().out
