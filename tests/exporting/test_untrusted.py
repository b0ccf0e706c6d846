"""What exports read of others: their own logs, and the tokenizer files that they copy along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import surgery
from surgery.exporting import provenance
from surgery.exporting.provenance import File, Provenance
from surgery.exporting.transformers import _tokenizer_files


def written(folder: Path, **changes: Any) -> None:
    """A log with a checksum that fits, as a forger would write it."""
    one = File(bytes=1, sha256="0" * 64)
    told = Provenance(
        export="python", options={}, versions={}, model_class="x", source=None, recipes=[],
        tensors={}, files={"model.py": one}, agreement={},
    ).model_dump(mode="json")  # fmt: skip
    told |= changes
    told["checksum"] = provenance.checksum(told)
    (folder / "surgery.json").write_text(json.dumps(told))


def test_a_log_that_is_read(tmp_path: Path) -> None:
    written(tmp_path)
    assert set(provenance.read(tmp_path).files) == {"model.py"}
    assert provenance.is_export(tmp_path)


@pytest.mark.parametrize("field", ["files", "origin"])
@pytest.mark.parametrize("name", ["../../.ssh/id_rsa", "/etc/passwd", "a/b", "C:x"])
def test_a_log_that_names_files_elsewhere(name: str, field: str, tmp_path: Path) -> None:
    written(tmp_path, **{field: {name: {"bytes": 1, "sha256": "0" * 64}}})
    with pytest.raises(surgery.ExportError, match="which lies outside the folder"):
        provenance.read(tmp_path)


def test_a_log_that_is_a_link_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    written(tmp_path)
    (tmp_path / "out" / "surgery.json").symlink_to("../surgery.json")
    with pytest.raises(surgery.ExportError, match="outside of its folder"):
        provenance.read(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind": "export", "kind": "x"}', "[" * 100_000])
def test_a_log_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "surgery.json").write_text(text)
    with pytest.raises(surgery.ExportError, match="is damaged"):
        provenance.read(tmp_path)
    assert not provenance.is_export(tmp_path)


def test_a_secret_is_not_copied_along_with_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text("{}")
    assert [path.name for path in _tokenizer_files(str(folder), nn.Linear(1, 1))] == [
        "tokenizer_config.json"
    ]
    (folder / "tokenizer.json").symlink_to("../id_rsa")
    with pytest.raises(surgery.ExportError, match=r"tokenizer\.json is a link to .*id_rsa"):
        _tokenizer_files(str(folder), nn.Linear(1, 1))
