from __future__ import annotations

import errno
from pathlib import Path

import pytest

from surgery import files


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path):
    path = tmp_path / "table.json"
    path.write_text("old")
    files.write(path, "new — Ω\n")
    assert path.read_bytes() == "new — Ω\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path):
    path = tmp_path / "table.npz"
    path.write_bytes(b"old")
    with files.beside(path) as work:
        work.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert work.parent == tmp_path
    assert path.read_bytes() == b"new"


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "table.npz"
    path.write_bytes(b"old")
    half_way = ValueError("half")

    def interrupted() -> None:
        with files.beside(path) as work:
            work.write_bytes(b"ha")
            raise half_way

    with pytest.raises(ValueError, match="half"):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.json"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.write(tmp_path / "nowhere" / "a", b"")
