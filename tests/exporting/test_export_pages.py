"""The pages on formats: their commands and their Python run in the order they stand in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from surgery.cli import app
from tests.exporting.together import Together

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

ROOT = Path(__file__).parents[2]
NEEDS = {"onnx": "onnxruntime", "transformers": "transformers", "diffusers": "diffusers"}
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["transformers", "diffusers", "python", "torch_export", "onnx"])
def test_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    checked = tmp_path / "checked"
    checked.mkdir()
    Together(checked, monkeypatch)  # the Python of the page loads what was written
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    page = (ROOT / "docs" / "export" / f"{name}.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(page)
    assert {kind for kind, _ in blocks} == {"console", "python"}
    names = {"__name__": name}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, f"{name}.md", "exec"), names)  # noqa: S102 - our own page
            continue
        for line in text.splitlines():
            done = CliRunner().invoke(app, shlex.split(line.removeprefix("$ surgery ")))
            assert done.exit_code == 0, f"{line}\n{done.output}"


def test_links_point_to_files_that_exist() -> None:
    for page in [ROOT / "docs" / "export.md", *(ROOT / "docs" / "export").glob("*.md")]:
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_format_has_a_page() -> None:
    from surgery.registry import FORMATS

    told = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    told += (ROOT / "docs" / "interchange.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS.names() if f"`{name}`" not in told] == []
