"""Whatever happens to a save, and whenever: the folder is the old one or the new one, whole."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.checkpoints import swap
from surgery.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals")


Told = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def told(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What ``kill_driver.py`` found, in a process of its own that may fork."""
    parent = tmp_path_factory.mktemp("kill")
    command = [sys.executable, "-m", "tests.checkpoints.kill_driver", str(parent)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=root, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["", "-renames"])
@pytest.mark.parametrize("what", ["steps", "errors"])
def test_at_every_step(what: str, how: str, told: Told) -> None:
    found = told[what + how]
    assert found["steps"] > 20
    assert found["seen"]["old"] >= 10  # before the exchange
    assert found["seen"]["new"] >= 3  # after it, while the old folder is removed
    assert found["left"] == []


@pytest.mark.parametrize("how", ["", "-renames"])
def test_at_random_moments(how: str, told: Told) -> None:
    found = told["random" + how]
    assert found["seen"] > 2  # saves did come through between the kills
    assert found["left"] == []


@pytest.mark.parametrize("how", ["", "-renames"])
def test_without_room_on_the_disk(how: str, told: Told) -> None:
    assert told["full" + how] == {"code": 3, "content": 1.0, "beside": []}


def test_this_file_system_can_exchange_folders(tmp_path: Path) -> None:
    """Otherwise the tests above prove one way only."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "x").touch()
    if not swap._exchange(one, other):
        pytest.skip("it cannot")
    assert (other / "x").exists()
    assert not (one / "x").exists()


def test_an_error_while_writing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = surgery.save(nn.Linear(2, 2), tmp_path / "out")
    before = (target / "surgery.json").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surgery.checkpoints.manifest.write", fail)
    with pytest.raises(OSError, match="No space left"):
        surgery.save(nn.Linear(3, 3), target)
    assert (target / "surgery.json").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_restore_recovers_the_old_folder(tmp_path: Path, caplog: Any) -> None:
    """The state between the two renames where folders cannot be exchanged."""
    model = nn.Linear(2, 2)
    target = surgery.save(model, tmp_path / "out")
    target.rename(tmp_path / ".out.surgery-old-00000000")
    (tmp_path / ".out.surgery-new-00000000").mkdir()
    with caplog.at_level(logging.WARNING, "surgery"):
        restored = surgery.restore(target, model=nn.Linear(2, 2))
    assert torch.equal(restored.weight, model.weight)
    assert "recovered" in caplog.text
    surgery.save(model, target)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_save_in_progress_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    def anything(_: Path) -> None:
        pass

    with swap.replacing(tmp_path / "out", anything) as first:
        (first / "a").touch()
        with swap.replacing(tmp_path / "out", anything) as second:
            (second / "b").touch()
        assert (first / "a").exists()
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["a"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_saves_from_several_threads(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(value: float) -> None:
        model = nn.Linear(8, 8)
        nn.init.constant_(model.weight, value)
        try:
            for _ in range(10):
                surgery.save(model, tmp_path / "out")
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    restored = surgery.restore(tmp_path / "out", model=nn.Linear(8, 8))
    assert len(restored.weight.unique()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "model"
    real.mkdir(parents=True)
    (tmp_path / "out").symlink_to(real)
    surgery.save(nn.Linear(2, 2), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (real / "surgery.json").exists()


def test_folders_above_are_made(tmp_path: Path) -> None:
    surgery.save(nn.Linear(2, 2), tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "surgery.json").exists()


def test_the_folder_is_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    surgery.save(nn.Linear(2, 2), tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_turns_foreign_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise CheckpointError(f"{folder} is not ours")

    def write() -> None:
        with swap.replacing(tmp_path / "out", refuse) as work:
            (work / "a").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(CheckpointError, match="not ours"):
        write()
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
