"""``docs/adaptation.md`` says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from surgery.rules import yaml
from surgery.train.adapt.config import AdaptConfig, EstimatorConfig, InnerConfig
from surgery.train.adapt.tasks import OPENERS


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "adaptation.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(page, "python")
    scope: dict[str, object] = {"__name__": "page"}
    exec(compile(code, "page", "exec", dont_inherit=True), scope)  # noqa: S102 - our own
    assert (tmp_path / "runs" / "sine" / "model").is_dir()


def test_the_configuration_is_read(page: str) -> None:
    (text,) = blocks(page, "yaml")
    data, _ = yaml.load(text, "page")
    assert AdaptConfig.parse(data).inner.rule == "per-parameter"


def test_every_kind_estimator_and_key_is_described(page: str) -> None:
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    schema = TypeAdapter(EstimatorConfig).json_schema()
    names = [*OPENERS, *schema["discriminator"]["mapping"], *InnerConfig.model_fields]
    assert [name for name in names if f"`{name}`" not in rows] == []


def test_pictures_and_links_are_there(page: str, root: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page)
    assert [link for link in links if not (root / "docs" / link).exists()] == []
