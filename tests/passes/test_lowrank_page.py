"""The code of ``docs/lowrank.md`` runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery

PAGE = (Path(__file__).parents[2] / "docs" / "lowrank.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_page_runs() -> None:
    scope: dict[str, Any] = {"batch": {"input_ids": torch.arange(6)[None]}}
    exec(compile("\n".join(BLOCKS), "lowrank.md", "exec"), scope)  # noqa: S102 - our own page
    assert surgery.adapters.names(scope["model"]) == ("default", "french")
