"""``docs/trust.md``: its code runs, and prints what the page says it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_page(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    text = (root / "docs" / "trust.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (told,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/trust.md", "exec"), {"__name__": "docs"})  # noqa: S102 - our own page
    printed = capsys.readouterr().out.replace(str(tmp_path.resolve()), "/path/to")
    assert printed.strip() == told.strip()
