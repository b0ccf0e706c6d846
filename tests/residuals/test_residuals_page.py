"""The code of ``docs/residuals.md`` runs, and finds what the page says."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "residuals.md"


def test_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = "\n".join(blocks)
    assert code.count("assert ") == 2
    exec(compile(code, PAGE.name, "exec"), {"__name__": PAGE.name})  # noqa: S102  our own page
