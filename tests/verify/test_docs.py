"""The code of ``docs/verify.md`` and ``docs/checkpoints.md`` runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


@pytest.mark.parametrize("page", ["verify.md", "checkpoints.md"])
def test_the_page_runs(
    page: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (root / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    code = compile("\n".join(blocks), page, "exec")
    exec(code, {"__name__": page})  # noqa: S102 - a page of this project
