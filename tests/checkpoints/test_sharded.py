"""Checkpoints as a stranger may have written them: read exactly, or refused before allocation."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery.checkpoints.sharded import open_checkpoint
from surgery.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def tensors() -> dict[str, Tensor]:
    return {
        "a": torch.arange(15.0).reshape(5, 3),
        "b": torch.arange(4).to(torch.bfloat16),
        "none": torch.empty(0, 3),
        "c": torch.arange(6, dtype=torch.int8).reshape(2, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    made = tmp_path / "model"
    made.mkdir()
    found = tensors()
    parts = {FIRST: ["a", "b", "none"], SECOND: ["c", "one"]}
    for file, names in parts.items():
        save_file({name: found[name] for name in names}, made / file, {"format": "pt"})
    weight_map = {name: file for file, names in parts.items() for name in names}
    (made / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return made


def test_every_tensor_is_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    expected = tensors()
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
    assert checkpoint.nbytes == sum(t.numel() * t.element_size() for t in expected.values())
    assert [file.name for file in checkpoint.files] == [FIRST, SECOND]
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.tensors["c"].file == folder / SECOND
    checkpoint.check_unchanged()


def test_rows(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    whole = tensors()
    assert torch.equal(checkpoint.read_rows("a", 1, 4), whole["a"][1:4])
    assert torch.equal(checkpoint.read_rows("b", 3, 4), whole["b"][3:4])
    assert checkpoint.read_rows("a", 5, 5).shape == (0, 3)
    assert checkpoint.read_rows("none", 0, 0).shape == (0, 3)
    for name, start, stop in (("a", 0, 6), ("a", -1, 2), ("a", 3, 2), ("one", 0, 1)):
        with pytest.raises(CheckpointError, match=rf"{name} has the shape .* no rows {start} to"):
            checkpoint.read_rows(name, start, stop)


def test_a_single_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.index is None
    assert torch.equal(checkpoint.read("w"), torch.ones(2))
    variant = open_checkpoint(tmp_path, "diffusion_pytorch_model.fp16")
    assert torch.equal(variant.read("w"), torch.zeros(2))


def test_threads(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    expected, wrong = tensors(), list[str]()

    def work() -> None:
        for name in [*expected] * 20:
            if not torch.equal(checkpoint.read(name), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / INDEX
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def outside(folder: Path, name: str) -> None:
    """Leave a link to the file, which is put beside the folder."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(Path("..", name))


def lie(folder: Path) -> None:
    """Let the first shard's header say that there is far more than the file holds."""
    header = {"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    text = json.dumps(header).encode()
    (folder / FIRST).write_bytes(struct.pack("<Q", len(text)) + text)


def pickled(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")


def twins(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    for name in ("one", "two"):
        save_file({"w": torch.ones(1)}, folder / f"{name}.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard upwards": (
        lambda f: edit(f, lambda m: m.update(a="../x.safetensors")),
        "'a' gives the path '../x.safetensors', which lies outside",
    ),
    "an absolute shard": (
        lambda f: edit(f, lambda m: m.update(a="/x.safetensors")),
        "'a' gives the path '/x.safetensors', which lies outside",
    ),
    "a shard in a folder": (
        lambda f: edit(f, lambda m: m.update(a="sub/x.safetensors")),
        "which lies outside",
    ),
    "a pickle as a shard": (
        lambda f: edit(f, lambda m: m.update(a="x.bin")),
        r"gives 'x\.bin', expected a \.safetensors file",
    ),
    "a shard that is no text": (
        lambda f: edit(f, lambda m: m.update(a=7)),
        "gives 7 as a file name",
    ),
    "a shard that is not there": (lambda f: (f / SECOND).unlink(), "names the shard .*not there"),
    "a shard that is a folder": (
        lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()),
        "is a folder, expected a file",
    ),
    "a shard that is a pipe": (
        lambda f: ((f / SECOND).unlink(), os.mkfifo(f / SECOND)),
        "is a pipe, device or socket",
    ),
    "a shard that is a link out": (lambda f: outside(f, SECOND), "link to .*, outside of its fol"),
    "an index that is a link out": (lambda f: outside(f, INDEX), "link to .*, outside of its fol"),
    "a link that leads nowhere": (
        lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to("nothing")),
        "is a link that cannot be followed",
    ),
    "a shard that is not listed": (
        lambda f: shutil.copy(f / FIRST, f / "model-00003-of-00003.safetensors"),
        "'model-00003-of-00003.safetensors' is there, but .* does not list it",
    ),
    "a name the shard lacks": (
        lambda f: edit(f, lambda m: m.update(ghost=FIRST)),
        "holds 'ghost', which it does not",
    ),
    "a name in the other shard": (
        lambda f: edit(f, lambda m: m.update(c=FIRST)),
        "holds 'c', which it does not",
    ),
    "a name that is not listed": (
        lambda f: edit(f, lambda m: m.pop("one")),
        "holds 'one', which .* does not list there",
    ),
    "a name in two shards": (
        lambda f: shutil.copy(f / FIRST, f / SECOND),
        f"'a' is in {FIRST} and in {SECOND}",
    ),
    "an empty index": (lambda f: edit(f, lambda m: m.clear()), "non-empty 'weight_map'"),
    "an index that is a list": (lambda f: (f / INDEX).write_text("[]"), "JSON object, got list"),
    "a key twice in the index": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'),
        "the key 'a' is there twice",
    ),
    "a file and an index": (
        lambda f: shutil.copy(f / FIRST, f / "model.safetensors"),
        "holds several checkpoints: model.safetensors, model.safetensors.index.json",
    ),
    "a header that lies": (lie, "is truncated"),
    "a pickle": (pickled, r"holds the pickle 'pytorch_model\.bin' and no"),
    "two checkpoints": (twins, "several checkpoints: one.safetensors, two.safetensors"),
    "nothing": (shutil.rmtree, "is no folder"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, said = BROKEN[how]
    spoil(folder)
    monkeypatch.setattr(torch, "empty", _no_allocation)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


def _no_allocation(*_: object, **__: object) -> None:
    raise AssertionError("a tensor was allocated before the checkpoint was refused")


def test_links_within_the_folder_and_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    (folder / FIRST).rename(folder / "stored")
    (folder / FIRST).symlink_to("stored")
    assert torch.equal(open_checkpoint(folder).read("a"), tensors()["a"])
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, name in enumerate((FIRST, SECOND, INDEX)):
        shutil.copy(folder / name, repository / "blobs" / str(number))
        (snapshot / name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert torch.equal(open_checkpoint(snapshot).read("c"), tensors()["c"])


@pytest.mark.parametrize("how", ["written to", "replaced", "cut", "gone"])
def test_a_file_that_changes_meanwhile(how: str, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    file = folder / FIRST
    data = file.read_bytes()
    if how == "replaced":
        (folder / "new").write_bytes(data)
        (folder / "new").rename(file)
    elif how == "gone":
        file.unlink()
    else:
        file.write_bytes(data if how == "written to" else data[:-4])
        os.utime(file, ns=(0, 0))  # a file system's clock may be coarser than this test
    said = "does not exist" if how == "gone" else "changed while it was read"
    with pytest.raises(CheckpointError, match=said):
        checkpoint.read("a")
    with pytest.raises(CheckpointError, match=said):
        checkpoint.check_unchanged()
    assert torch.equal(checkpoint.read("c"), tensors()["c"])


def test_an_unknown_name(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tensor 'nothing'"):
        open_checkpoint(folder).read("nothing")
