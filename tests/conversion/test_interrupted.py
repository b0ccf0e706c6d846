"""A conversion that stops half-way leaves the source and the output alone, and goes on later."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import surgery
from surgery import LowRank, Recipe, Rule
from surgery import Path as At
from surgery.checkpoints.swap import continuing, unfinished
from surgery.conversion import engine, streams
from surgery.conversion.journal import Finished, Journal
from surgery.errors import CheckpointError
from tests.zoo import build

WHERE = At("model.layers.*.self_attn.q_proj")
RULES = Recipe(
    rules=[Rule(LowRank(method="olora", rank=2, keep_base="source"), where=WHERE)],
    recipe="test",
)
SIZE = "8KB"


class Stop(Exception):
    """What ends a conversion here."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "source"
    build("llama")[0].save_pretrained(folder, max_shard_size="10KB")  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a conversion that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    surgery.convert(source, RULES, out, max_shard_size=SIZE)
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopping_after(count: int, act: Callable[[], None]) -> Callable[..., None]:
    """``Journal.finish`` that acts once so many files are finished."""
    finish, lock, done = Journal.finish, threading.Lock(), [0]

    def instead(self: Journal, name: str, entry: Finished) -> None:
        finish(self, name, entry)
        with lock:
            done[0] += 1
            if done[0] == count:
                act()

    return instead


def stop() -> None:
    raise Stop


@pytest.mark.parametrize("count", [1, 3, 100])
def test_goes_on_where_it_stopped(
    count: int,
    source: Path,
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, out = files(source), tmp_path / "out"
    with monkeypatch.context() as patched:
        if count == 100:
            patched.setattr("surgery.conversion.saved.manifest.write", lambda *_: stop())
        else:
            patched.setattr(Journal, "finish", stopping_after(count, stop))
        with pytest.raises(Stop):
            surgery.convert(source, RULES, out, max_shard_size=SIZE, threads=2)
    assert not out.exists()
    assert unfinished(out).is_dir()
    told = [json.loads(line) for line in Journal(out, {}).path.read_text().splitlines()]
    finished = sum(line["bytes"] for line in told if "file" in line)
    assert finished > 0
    done = surgery.convert(source, RULES, out, max_shard_size=SIZE, threads=2)
    assert done.resumed == finished
    assert files(out) == wanted
    assert files(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_files_are_recognised_by_their_hash(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish", stopping_after(3, stop))
        with pytest.raises(Stop):
            surgery.convert(source, RULES, out, max_shard_size=SIZE, threads=1)
    kept = sorted(unfinished(out).glob("*.safetensors"))
    assert len(kept) == 3
    data = bytearray(kept[0].read_bytes())
    data[-1] ^= 1
    kept[0].write_bytes(bytes(data))
    (unfinished(out) / "foreign.txt").write_text("left by somebody")
    done = surgery.convert(source, RULES, out, max_shard_size=SIZE, threads=1)
    assert done.resumed == sum(len(wanted[path.name]) for path in kept[1:])
    assert files(out) == wanted


def test_journal_cut_off_in_a_line(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish", stopping_after(2, stop))
        with pytest.raises(Stop):
            surgery.convert(source, RULES, out, max_shard_size=SIZE, threads=1)
    path = Journal(out, {}).path
    path.write_bytes(path.read_bytes()[:-20])
    done = surgery.convert(source, RULES, out, max_shard_size=SIZE, threads=1)
    assert 0 < done.resumed < sum(map(len, wanted.values()))
    assert files(out) == wanted


def test_another_conversion_begins_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish", stopping_after(2, stop))
        with pytest.raises(Stop):
            surgery.convert(source, RULES, out, max_shard_size=SIZE)
    done = surgery.convert(source, RULES, out, max_shard_size=SIZE, dtype="bfloat16")
    assert done.resumed == 0
    assert "of another conversion" in caplog.text
    assert surgery.restore(out).get_parameter("lm_head.weight").dtype.itemsize == 2


def test_old_output_stays_until_the_new_one_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    surgery.convert(source, None, out, dtype="float16")
    before = files(out)
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish", stopping_after(2, stop))
        with pytest.raises(Stop):
            surgery.convert(source, None, out, dtype="bfloat16")
    assert files(out) == before
    surgery.convert(source, None, out, dtype="bfloat16")
    assert files(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", ["written", "touched", "replaced"])
def test_source_that_changes_meanwhile(
    how: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "source"
    mine.mkdir()
    for name, data in files(source).items():
        (mine / name).write_bytes(data)
    shard = max(mine.glob("*.safetensors"))

    def disturb() -> None:
        if how == "written":
            with shard.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
        elif how == "touched":
            os.utime(shard, ns=(0, 0))
        else:
            data = shard.read_bytes()
            shard.unlink()
            shard.write_bytes(data)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish", stopping_after(1, disturb))
        with pytest.raises(CheckpointError, match="changed while"):
            surgery.convert(mine, RULES, tmp_path / "out", max_shard_size=SIZE, threads=1)
    assert not (tmp_path / "out").exists()
    assert surgery.convert(mine, RULES, tmp_path / "out", max_shard_size=SIZE).resumed == 0


def test_disk_that_gets_full(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [20_000]
    write = streams.write

    def limited(target: int, data: memoryview, at: int) -> None:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(target, data, at)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(streams, "write", limited)
        patched.setattr("surgery.conversion.streams._in_kernel", lambda *_: None)
        with pytest.raises(OSError, match="No space"):
            surgery.convert(source, RULES, out, max_shard_size=SIZE, threads=1)
    assert not out.exists()
    assert surgery.convert(source, RULES, out, max_shard_size=SIZE).resumed > 0
    assert files(out) == wanted


def test_too_little_space_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine.shutil,  # type: ignore[attr-defined]
        "disk_usage",
        lambda _: type("Usage", (), {"free": 1000})(),
    )
    with pytest.raises(CheckpointError, match="1000 B free"):
        surgery.convert(source, RULES, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(unfinished(tmp_path / "out").iterdir()) == []


def test_two_conversions_to_one_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        continuing(out, lambda _: None),
        pytest.raises(CheckpointError, match="another process"),
    ):
        surgery.convert(source, RULES, out)
