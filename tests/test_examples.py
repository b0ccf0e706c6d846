"""Every example runs from start to end, in short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Arguments that make an example short; what it claims it still checks itself.
SHORT = {"minilm_lora.py": ["--seconds", "2", "--texts", "20"]}


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), *SHORT[script]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "What was proved" in done.stdout
    assert "bitwise equal" in done.stdout
