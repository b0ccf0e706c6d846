"""The page on sources: its code runs as written, in order."""

from __future__ import annotations

import re
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_code_runs(root: Path) -> None:
    blocks = BLOCK.findall((root / "docs" / "sources.md").read_text(encoding="utf-8"))
    assert len(blocks) == 3
    code = compile("\n".join(blocks), "docs/sources.md", "exec")
    exec(code, {"__name__": "docs"})  # noqa: S102 -- our own page


def test_the_counts_it_claims(root: Path) -> None:
    from tests import zoo
    from tests.sources import test_infer

    text = (root / "docs" / "sources.md").read_text(encoding="utf-8")
    assert len(test_infer.TRANSFORMERS.split()) > 170
    in_zoo = len(zoo.names("diffusers"))
    assert f"{len(test_infer.DIFFUSERS) + in_zoo} models of diffusers" in text
    assert f"{len(test_infer.TIMM.split())}\nof timm" in text
