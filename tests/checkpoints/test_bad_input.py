"""A folder that is not what save wrote: every damage is named, nothing is run, nothing changes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import Rule
from surgery.checkpoints import manifest, tensorfile
from surgery.errors import CheckpointError, RuleError, SurgeryError
from tests import zoo
from tests.verify.rewrites import Graft, Round


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8)
        self.two = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


@pytest.fixture
def folder(tmp_path: FilePath) -> FilePath:
    model = zoo.perturb(Net()).eval()
    surgery.apply(model, [Rule(Graft()), Rule(Round())])
    return surgery.save(model, tmp_path / "out", max_shard_size=200)


def refused(folder: FilePath, said: str, kind: type[SurgeryError] = CheckpointError) -> None:
    """Restoring fails with this message, and leaves the model it was given as it was."""
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=said):
        surgery.restore(folder, model=model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def flip(path: FilePath, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard(folder: FilePath) -> FilePath:
    return sorted(folder.glob("model-*.safetensors"))[1]


DAMAGES: dict[str, tuple[Callable[[FilePath], Any], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "does not exist"),
    "no surgery.json": (lambda f: (f / "surgery.json").unlink(), r"has no surgery\.json"),
    "a shard is missing": (lambda f: shard(f).unlink(), "00002-of-.* is missing"),
    "the index is missing": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        r"index\.json is missing",
    ),
    "a shard is truncated": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-5]),
        r"00002-of-.* is truncated: \d+ of \d+ bytes",
    ),
    "a shard is empty": (lambda f: shard(f).write_bytes(b""), "is truncated: 0 of"),
    "a shard has grown": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"),
        "is corrupted",
    ),
    "a weight is corrupted": (lambda f: flip(shard(f), -3), "SHA-256"),
    "a header is corrupted": (lambda f: flip(shard(f), 30), "SHA-256"),
    "the kept weights are corrupted": (lambda f: flip(f / "kept.safetensors", -1), "SHA-256"),
    "the recipe was edited": (lambda f: flip(f / "recipe.yaml", 3), r"recipe\.yaml .*SHA-256"),
    "a shard is a link": (
        lambda f: (shard(f).rename(f.parent / "x"), shard_link(f)),
        "00002-of-.* is a link to .*, outside of its folder",
    ),
    "surgery.json is cut": (
        lambda f: (f / "surgery.json").write_text((f / "surgery.json").read_text()[:-40]),
        "not valid JSON",
    ),
    "surgery.json is binary": (
        lambda f: (f / "surgery.json").write_bytes(b"\xff\xfe\x00"),
        "not valid JSON",
    ),
    "surgery.json is a list": (lambda f: (f / "surgery.json").write_text("[]"), "JSON object"),
    "surgery.json is very deep": (
        lambda f: (f / "surgery.json").write_text("[" * 200_000),
        "not valid JSON",
    ),
    "surgery.json was tampered with": (
        lambda f: (f / "surgery.json").write_text(
            (f / "surgery.json").read_text().replace('"training": false', '"training": true')
        ),
        "was changed after it was written: its checksum does not fit",
    ),
}


def shard_link(folder: FilePath) -> None:
    name = sorted(json.loads((folder / "surgery.json").read_text())["files"])
    missing = next(n for n in name if not (folder / n).exists())
    (folder / missing).symlink_to(folder.parent / "x")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, folder: FilePath) -> None:
    spoil, said = DAMAGES[damage]
    spoil(folder)
    refused(folder, said)


def test_a_snapshot_in_the_cache_of_the_hub(folder: FilePath, tmp_path: FilePath) -> None:
    """Its files are links by design."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(FilePath("..", "..", "blobs", str(number)))
    assert surgery.restore(snapshot, model=Net()).state_dict()
    (snapshot / "recipe.yaml").unlink()
    (snapshot / "recipe.yaml").symlink_to(FilePath("..", "..", "..", "secret"))
    (tmp_path / "secret").write_text("x")
    refused(snapshot, r"recipe\.yaml is a link to .*secret, outside of its folder")


def forge(folder: FilePath, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change surgery.json and give it a checksum that fits, as an attacker would."""
    path = folder / "surgery.json"
    data = json.loads(path.read_text())
    del data["checksum"]
    change(data)
    data["checksum"] = manifest.checksum(data)
    path.write_text(json.dumps(data))


def put(*keys: str) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """A change that sets one nested value."""

    def with_value(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            for key in keys[:-1]:
                data = data[key]
            data[keys[-1]] = value

        return change

    return with_value


def move_file(name: str) -> Callable[[dict[str, Any]], None]:
    """List one of the files under another name."""

    def change(data: dict[str, Any]) -> None:
        old = next(iter(data["files"]))
        data["files"][name] = data["files"].pop(old)
        for section in ("state", "kept"):
            for entry in data[section].values():
                entry["file"] = name if entry["file"] == old else entry["file"]

    return change


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a newer format": (put("format")(2), "has format 2; this version of surgery reads up to 1"),
    "no format": (put("format")("1"), "its format is '1', expected a number"),
    "an old format": (put("format")(0), "is damaged: format"),
    "an unknown field": (put("run")("rm"), "is damaged: run"),
    "a field of another type": (put("training")("no"), "is damaged: training"),
    "a missing field": (lambda d: d.pop("trainable"), "is damaged: trainable"),
    "a shape that is none": (put("state", "one.bias", "shape")([-8]), r"damaged: state\.one\.bias"),
    "another shape": (put("state", "one.bias", "shape")([4]), r"as F32 \[8\], .* says F32 \[4\]"),
    "another dtype": (put("state", "one.bias", "dtype")("F16"), "one.bias as F32"),
    "strides of another shape": (put("state", "one.bias", "stride")([1, 1]), "the strides"),
    "strides that allocate the world": (
        put("state", "one.bias", "stride")([1 << 40]), "one.bias the strides",
    ),
    "a file that is not listed": (put("state", "one.bias", "file")("x.safetensors"), "not listed"),
    "a path upwards": (move_file("../../secret.safetensors"), "is no plain file name"),
    "an absolute path": (move_file("/etc/passwd.safetensors"), "is no plain file name"),
    "a backslash": (move_file("..\\x.safetensors"), "is no plain file name"),
    "a hidden file": (move_file(".x.safetensors"), "is no plain file name"),
    "itself": (move_file("surgery.json"), "is no plain file name"),
    "a pickle": (move_file("pytorch_model.bin"), "lists the pickle 'pytorch_model.bin'"),
    "a tie to nothing": (put("ties")({"a": "b"}), "'a' is tied to 'b', which is not listed"),
    "a log of a newer format": (put("record", "format")(9), "edit log has format 9"),
    "a damaged log": (put("record", "operations")([{}]), "edit log is damaged"),
    "a key the model lacks": (
        lambda d: d["state"].update({"three.weight": d["state"]["one.weight"]}),
        r"does not hold three\.weight",
    ),
    "a key the folder lacks": (lambda d: d["state"].pop("one.bias"), r"folder has no one\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_is_refused(forgery: str, folder: FilePath) -> None:
    change, said = FORGERIES[forgery]
    forge(folder, change)
    refused(folder, said)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "transformers.utils.import_utils.LazyModule",
        "torch.nn.modules.linear.Linear",
        "transformers.models.bert.modeling_bert.torch",
    ],
)
def test_a_class_outside_the_libraries_is_never_built(target: str, tmp_path: FilePath) -> None:
    model, _ = zoo.build("bert")
    folder = surgery.save(model, tmp_path / "out")
    forge(folder, put("source", "class")(target))
    with pytest.raises(CheckpointError):
        surgery.restore(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("source", "library")("os"), "names the library 'os'"),
        (put("source", "config")("x"), "'config'"),
        (put("source", "dtypes")({"default": "load"}), "the dtype 'load'"),
    ],
)
def test_a_hostile_source_is_refused(change: Any, said: str, tmp_path: FilePath) -> None:
    folder = surgery.save(zoo.build("bert")[0], tmp_path / "out")
    forge(folder, change)
    with pytest.raises(CheckpointError, match=said):
        surgery.restore(folder)


def test_a_folder_saved_with_other_sizes(tmp_path: FilePath) -> None:
    folder = surgery.save(zoo.build("bert")[0], tmp_path / "out")
    forge(folder, put("source", "config", "num_hidden_layers")(2))
    with pytest.raises(CheckpointError, match=r"other keys or shapes|the model has no"):
        surgery.restore(folder)


def test_a_pass_that_is_not_installed_is_named(folder: FilePath) -> None:
    def change(data: dict[str, Any]) -> None:
        (operation,) = data["record"]["operations"]
        operation["recipe"]["rules"][0].update({"pass": "grift"})

    forge(folder, change)
    refused(folder, "grift", RuleError)


def test_a_folder_with_a_pickle_and_nothing_of_ours(tmp_path: FilePath) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds the pickle pytorch_model\.bin and no"):
        surgery.restore(tmp_path)


def test_a_file_instead_of_a_folder(tmp_path: FilePath) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        surgery.restore(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        surgery.save(Net(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "x"


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: FilePath) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex and was not written by surgery"):
        surgery.save(Net(), target)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert (target / "thesis.tex").read_text() == "x"


def test_a_file_put_beside_a_saved_model_is_not_deleted(tmp_path: FilePath) -> None:
    target = surgery.save(Net(), tmp_path / "out")
    (target / "notes.md").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds notes\.md besides the saved model"):
        surgery.save(Net(), target)
    (target / "notes.md").unlink()
    surgery.save(Net(), target)


def test_an_empty_folder_is_taken(tmp_path: FilePath) -> None:
    (tmp_path / "out").mkdir()
    folder = surgery.save(Net(), tmp_path / "out")
    surgery.restore(folder, model=Net())


# Headers that pickle no code but lie about what follows.
def tensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated: 0 bytes"),
        (struct.pack("<Q", 1 << 60), "its header would be"),
        (struct.pack("<Q", 50) + b"{}", "truncated: 10 bytes, its header ends at 58"),
        (tensors(b"{"), "not a safetensors file"),
        (tensors(b"[]"), "no JSON object"),
        (tensors(b"[" * 100_000), "not a safetensors file"),
        (tensors(one(), b"1234567"), "is truncated"),
        (tensors(one(), b"123456789"), "is damaged"),
        (tensors(one(dtype="F31"), b"12345678"), "header of 'a' is damaged"),
        (tensors(one(shape=[3]), b"12345678"), r"8 bytes for shape \(3,\)"),
        (tensors(one(shape=[-2]), b"12345678"), "header of 'a' is damaged"),
        (tensors(one(data_offsets=[8, 0]), b"12345678"), "header of 'a' is damaged"),
        (tensors(one(data_offsets=[1]), b"12345678"), "header of 'a' is damaged"),
        (tensors({**one(), "b": one()["a"]}, b"12345678"), "overlap or leave gaps"),
        (tensors({"a": 3}), "header of 'a' is damaged"),
    ],
)
def test_a_tensor_file_that_lies(content: bytes, said: str, tmp_path: FilePath) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        tensorfile.contents(path)
