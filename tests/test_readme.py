"""The README's tour runs as written, in order, in one place."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


@pytest.fixture
def tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's rule file, as the current one."""
    monkeypatch.chdir(tmp_path)
    (rules,) = blocks("yaml")
    assert rules.startswith("# rules.yaml\n")
    (tmp_path / "rules.yaml").write_text(rules)
    return tmp_path


def test_python_blocks_run_in_order_and_print_what_the_readme_shows(
    tour: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    script = tour / "tour.py"
    script.write_text("\n".join(blocks("python")))
    variables = runpy.run_path(str(script))
    printed = capsys.readouterr().out
    assert variables["report"].ok
    for shown in blocks("text"):
        missing = [line for line in shown.splitlines() if line.strip() not in printed]
        # How much, and which output changes most, depends on the untrained model's random weights.
        assert [line for line in missing if "random insertions change the output" not in line] == []


@pytest.mark.parametrize("line", [line for b in blocks("console") for line in b.splitlines()])
def test_console_lines_are_verbs_that_exist(line: str) -> None:
    from typer.main import get_command

    from surgery.cli import app

    assert line.startswith("$ surgery ")
    verb = shlex.split(line)[2]
    assert verb in get_command(app).commands  # type: ignore[attr-defined]


def test_console_lines_run_in_order(tour: Path) -> None:
    from typer.testing import CliRunner

    from surgery.cli import app

    for line in [line for block in blocks("console") for line in block.splitlines()]:
        arguments = shlex.split(line.removeprefix("$ surgery "))
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"


def test_links_point_to_files_that_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
