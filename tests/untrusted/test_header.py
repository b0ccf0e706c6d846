"""Headers of safetensors files: what the safetensors package writes is read, lies are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery.errors import CheckpointError
from surgery.untrusted.header import DTYPES, read_header


def written(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}


HUGE = 1 << 62
#: Header, bytes after it, what is said.
LIES: dict[str, tuple[Any, bytes, str]] = {
    "a size that is a bool": (one(shape=[True, 2]), b"8" * 8, "the shape .*whole numbers"),
    "a size that is a float": (one(shape=[2.0]), b"8" * 8, r"the shape \[2\.0\], expected whole"),
    "a size that is text": (one(shape=["2"]), b"8" * 8, "the shape"),
    "a shape that is a number": (one(shape=2), b"8" * 8, "the shape 2"),
    "a shape that is an object": (one(shape={"0": 2}), b"8" * 8, "the shape"),
    "a negative size": (one(shape=[-2]), b"8" * 8, r"the shape \[-2\]"),
    "two negative sizes": (one(shape=[-1, -2]), b"8" * 8, "the shape"),
    "a size beyond 63 bits": (one(shape=[1 << 63]), b"8" * 8, "the shape"),
    "sizes whose product wraps": (one(shape=[HUGE, 4, 2]), b"8" * 8, "larger than any memory"),
    "an empty tensor of the world": (
        one(shape=[HUGE, HUGE, 0], data_offsets=[0, 0]), b"", "larger than any memory",
    ),
    "a thousand dimensions": (one(shape=[1] * 1000), b"8" * 8, "1000 dimensions, expected at most"),
    "an offset that is a bool": (one(data_offsets=[False, 8]), b"8" * 8, "data_offsets"),
    "an offset beyond 63 bits": (one(data_offsets=[0, 1 << 64]), b"8" * 8, "data_offsets"),
    "a negative offset": (one(data_offsets=[-8, 0]), b"8" * 8, "data_offsets"),
    "offsets the wrong way round": (one(data_offsets=[8, 0]), b"8" * 8, "a start and an end"),
    "three offsets": (one(data_offsets=[0, 4, 8]), b"8" * 8, "a start and an end"),
    "offsets into the header": (one(data_offsets=[0, 8], shape=[2]), b"", "is truncated"),
    "offsets beyond the file": (one(data_offsets=[8, 16]), b"8" * 8, "overlap or leave gaps"),
    "a gap before": (one(data_offsets=[1, 9]), b"8" * 9, "overlap or leave gaps"),
    "bytes after the end": (one(), b"8" * 9, "is damaged: .* its header says"),
    "two in one place": ({**one(), "b": one()["a"]}, b"8" * 8, "overlap or leave gaps"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"8" * 8, "expected data_off"),
    "a field too many": (one(stride=[1]), b"8" * 8, "expected data_offsets, dtype, shape"),
    "an unknown dtype": (one(dtype="F31"), b"8" * 8, "the dtype 'F31', expected one of F64"),
    "a dtype that is a list": (one(dtype=["F32"]), b"8" * 8, "the dtype"),
    "a dtype of 4 bits": (
        one(dtype="F4", shape=[16]), b"8" * 8, "dtype F4, whose elements share bytes",
    ),
    "a dtype of 6 bits": (one(dtype="F6_E2M3"), b"8" * 8, "F6_E2M3, whose elements share bytes"),
    "an entry that is a list": ({"a": [1, 2]}, b"", "expected data_offsets"),
    "metadata that is text": ({"__metadata__": "x"}, b"", "__metadata__ is damaged"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is damaged"),
    "a name twice": (
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
        ),
        b"88",
        "'a' is there twice",
    ),
    "NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"8", "NaN is no number"),
    "not UTF-8": (b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"8", "not valid"),
    "half a surrogate": (
        b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"8", "not valid JSON",
    ),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "nested too deeply"),
    "space before it": (b" {}", b"", "its header is no JSON object"),
    "a list": (b"[]", b"", "its header is no JSON object"),
    "nothing": (b"", b"", "its header is no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(lie: str, tmp_path: Path) -> None:
    header, data, said = LIES[lie]
    with pytest.raises(CheckpointError, match=said) as caught:
        read_header(written(tmp_path, header, data))
    assert str(tmp_path / "x.safetensors") in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (1 << 63, "its header would be 9223372036854775808 B"),
        (100_000_001, "its header would be 100000001 B"),
        (11, "is truncated: 10 bytes, its header ends at 19"),
    ],
)
def test_a_length_that_lies(length: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_header(written(tmp_path, b"{}", length=length))


def test_a_hundred_megabytes_of_junk_are_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = 99_000_000
    with path.open("wb") as file:
        file.write(struct.pack("<Q", size) + b'{"a":')
        file.truncate(8 + size)  # zeros, which take no room on the disk
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_header(path)


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        read_header(path)


def test_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        **{f"t.{name}": torch.zeros(2, 3).to(dtype) for dtype, name in DTYPES.items()},
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(1.0),
        'odd "name"\n/..': torch.ones(1),
    }
    save_file(tensors, path, {"format": "pt", "note": "é"})
    found = read_header(path)
    assert found.metadata == {"format": "pt", "note": "é"}
    assert set(found.slots) == set(tensors)
    for name, tensor in tensors.items():
        slot = found.slots[name]
        assert (slot.dtype, slot.shape) == (tensor.dtype, tuple(tensor.shape))
        assert slot.nbytes == tensor.numel() * tensor.element_size()
    assert max(slot.end for slot in found.slots.values()) == path.stat().st_size == found.size


def test_tensors_may_lie_anywhere_and_need_no_alignment(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "none": {"dtype": "F32", "shape": [0], "data_offsets": [1, 1]},
    }
    found = read_header(written(tmp_path, header, b"12345"))
    assert found.slots["b"].start - found.start == 1


def test_no_tensor_at_all(tmp_path: Path) -> None:
    assert read_header(written(tmp_path, b"{}   ")).slots == {}
