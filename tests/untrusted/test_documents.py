"""JSON from elsewhere has one meaning, or is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from surgery.errors import CheckpointError, DataError, SurgeryError
from surgery.untrusted import documents

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"a": 1', "not valid JSON"),
    "two values": (b"{}{}", "not valid JSON: Extra data"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
    "a key twice, further in": (b'[{"b": {"a": 1, "a": 1}}]', "the key 'a' is there twice"),
    "a key twice, spelled differently": (b'{"a": 1, "\\u0061": 3}', "the key 'a' is there twice"),
    "NaN": (b'{"a": NaN}', "NaN is no number of JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
    "a float too large": (b'{"a": 1e999}', "1e999 is too large a number"),
    "an integer of 5000 digits": (b"9" * 5000, "not valid JSON"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "UTF-8 with a mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "latin-1": ('{"é": 1}'.encode("latin-1"), "not valid JSON: 'utf-8' codec"),
    "half of a pair": (b'{"\\ud800": 1}', "not valid JSON: 'utf-8' codec"),
    "half of a pair as a value": (b'["\\udfff"]', "not valid JSON: 'utf-8' codec"),
    "two megabytes of brackets": (b"[" + b"[]," * 700_000 + b"[]]", "700002 brackets"),
    "two megabytes of numbers": (b"[" + b"7," * 1_000_000 + b"7]", "1000000 commas"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    data, said = REFUSED[case]
    with pytest.raises(CheckpointError, match=said) as caught:
        documents.parse(data, "x.json")
    assert str(caught.value).startswith("x.json: ")
    assert len(str(caught.value)) < 400


def test_what_is_read() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00é"], "b": {}}'.encode()
    assert documents.parse(text, "x") == {"a": [1, -2500.0, True, None, "😀é"], "b": {}}


def test_infinities_where_they_may_stand() -> None:
    assert documents.parse(b"[Infinity, 1]", "x", infinities=True) == [float("inf"), 1]
    with pytest.raises(CheckpointError, match="too large a number"):
        documents.parse(b"[1e999]", "x", infinities=True)


def test_a_header_of_a_large_model_is_not_too_dense() -> None:
    entries = (
        f'"model.layers.{i}.mlp.experts.{i}.w":{{"dtype":"F8_E4M3","shape":[7168,2048],'
        f'"data_offsets":[{i * 14680064},{(i + 1) * 14680064}]}}'
        for i in range(20_000)
    )
    found = documents.parse_object(("{" + ",".join(entries) + "}").encode(), "x")
    assert len(found) == 20_000


def test_the_smallest_entries_are_not_too_dense() -> None:
    entries = (f'"{i:x}":{{"dtype":"U8","shape":[],"data_offsets":[0,1]}}' for i in range(40_000))
    data = ("{" + ",".join(entries) + "}").encode()
    assert len(data) > 1 << 20
    assert len(documents.parse_object(data, "x")) == 40_000


def test_a_list_is_no_object() -> None:
    with pytest.raises(DataError, match="x: expected a JSON object, got list"):
        documents.parse_object(b"[]", "x", error=DataError)


def test_a_message_is_bounded() -> None:
    """Whatever it quotes; its beginning and its end stay."""
    text = str(CheckpointError("first " + "x" * 10_000_000 + " last", hint="do this"))
    assert len(text) < 9000
    assert text.startswith("first x")
    assert text.endswith(" last\n  hint: do this")


def large(folder: Path) -> Path:
    path = folder / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return path


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def dangling(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "nothing", "nothing does not exist"),
        (lambda folder: folder, "is a folder, expected a file"),
        (large, "has 1099511627776 bytes, expected at most"),
        (pipe, "is a pipe, device or socket"),
        (dangling, "is a link that leads nowhere"),
    ],
)
def test_files_that_are_not_read(make, said: str, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=said):
        documents.read_object(make(tmp_path))
