"""Every example runs from start to end, in short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Arguments that make an example short; what it claims it still checks itself.
SHORT = {
    "deep_linear.py": ["--time", "80"],
    "minilm_export.py": ["--only", "both", "--formats", "transformers"],
    "minilm_ancre.py": ["--steps", "2", "--texts", "8"],
    "minilm_lora.py": ["--seconds", "2", "--texts", "20"],
    "minilm_mirror.py": ["--steps", "1", "--tasks", "1", "--texts", "20"],
}
#: What shows that an example came to its end.
SAYS = {
    "deep_linear.py": ["each falls as theory says", "deep_linear.png"],
    "minilm_export.py": ["give the sentence embeddings of the model in memory"],
    "minilm_ancre.py": ["What was proved", "bitwise equal"],
    "minilm_lora.py": ["What was proved", "bitwise equal"],
    "minilm_mirror.py": ["What was proved", "bitwise equal", "query loss of a new task"],
}


#: What examples import, and nobody runs.
SHARED = {"minilm.py"}
SCRIPTS = {path.name for path in (ROOT / "examples").glob("*.py")} - SHARED


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_example(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), *SHORT[script]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = "".join(done.stdout.split())  # a long path is folded over lines
    assert [words for words in SAYS[script] if words.replace(" ", "") not in said] == []
