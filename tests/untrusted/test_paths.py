"""Names that lead out of a folder, and links that do."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import CheckpointError, DataError
from surgery.untrusted.paths import check_inside, plain_name

OUTSIDE = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "C:\\x.safetensors",
    "\\\\host\\share\\x.safetensors",
    "sub/x.safetensors",
    "./../x.safetensors",
    "x.safetensors:stream",
    "..",
    ".",
    "",
    "/",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_is_no_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="which lies outside the folder"):
        plain_name(name, "index")


@pytest.mark.parametrize("name", [None, 3, True, ["a"], "a\0b", "a\nb", "\x1b[2Jb", "é" * 128])
def test_what_is_no_name_at_all(name: object) -> None:
    with pytest.raises(DataError, match=r"index gives .* as a file name"):
        plain_name(name, "index", error=DataError)


def test_a_name_of_another_kind() -> None:
    with pytest.raises(CheckpointError, match=r"gives 'x\.bin', expected a \.safetensors file"):
        plain_name("x.bin", "index", suffix=".safetensors")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "modèle 2.safetensors"])
def test_a_name(name: str) -> None:
    assert plain_name(name, "index", suffix=".safetensors") == name


def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "real").write_text("x")
    (tmp_path / "outside").write_text("x")
    (folder / "inside").symlink_to(Path("below", "real"))
    (folder / "out").symlink_to(Path("..", "outside"))
    (folder / "far").symlink_to(tmp_path / "outside")
    (folder / "twice").symlink_to("out")
    (folder / "around").symlink_to("around")
    (folder / "gone").symlink_to("nothing")
    check_inside(folder / "inside", folder)
    check_inside(folder / "below" / "real", folder)
    check_inside(folder / "not there", folder)
    for name in ("out", "far", "twice"):
        with pytest.raises(CheckpointError, match=r"is a link to .*/outside, outside of its fold"):
            check_inside(folder / name, folder)
    for name in ("around", "gone"):
        with pytest.raises(CheckpointError, match="is a link that cannot be followed"):
            check_inside(folder / name, folder)


def test_a_folder_that_is_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a").write_text("x")
    (tmp_path / "folder").symlink_to(tmp_path / "disk")
    check_inside(tmp_path / "folder" / "a", tmp_path / "folder")


def test_the_folders_above_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "disk" / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "disk" / "folder" / "sub" / "a").write_text("x")
    (tmp_path / "disk" / "folder" / "b").symlink_to("sub/a")
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    check_inside(tmp_path / "home" / "folder" / "b", tmp_path / "home" / "folder")


@pytest.mark.parametrize("sub", ["", "unet"])
def test_the_cache_of_the_hub(sub: str, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40) / sub
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "hash").write_text("x")
    (repository / "secret").write_text("x")
    up = "../" * (3 if sub else 2)
    (snapshot / "model").symlink_to(f"{up}blobs/hash")
    (snapshot / "evil").symlink_to(f"{up}secret")
    check_inside(snapshot / "model", snapshot)
    with pytest.raises(CheckpointError, match="outside of its folder"):
        check_inside(snapshot / "evil", snapshot)


def test_what_only_looks_like_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "hash").write_text("x")
    snapshot = tmp_path / "snapshots" / "one"
    snapshot.mkdir(parents=True)
    (snapshot / "model").symlink_to("../../blobs/hash")
    with pytest.raises(CheckpointError, match="outside of its folder"):
        check_inside(snapshot / "model", snapshot)
