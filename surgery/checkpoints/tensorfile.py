"""Safetensors files, written and read one tensor at a time.

The safetensors package takes and gives whole dictionaries. Here a file is written from tensors
where they lie and hashed on the way, so that saving holds no second copy of the model, and read
into tensors that own aligned memory instead of views of a mapped file that may change later.

Format: https://huggingface.co/docs/safetensors, an 8-byte little-endian length, a JSON header of
that length, then the tensors' bytes back to back.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from surgery.errors import CheckpointError

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: Bytes per element by the format's name of a dtype.
WIDTHS = {name: dtype.itemsize for dtype, name in DTYPES.items()}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_CHUNK = 1 << 24
_MAX_HEADER = 100_000_000  # the limit of the safetensors package

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a file: bytes ``start`` to ``end`` from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def write(path: Path, tensors: Sequence[tuple[str, Tensor]], advance: Advance) -> str:
    """Write a new file and flush it to the disk.

    Args:
        path: Must not exist.
        tensors: Names and dense tensors on any device.
        advance: Told the number of bytes each time some were written.

    Returns:
        The SHA-256 of the file, in hex.
    """
    # Widest elements first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(tensors, key=lambda pair: -pair[1].element_size())
    digest = sha256()
    with path.open("xb") as file:
        head = _header(ordered)
        file.write(head)
        digest.update(head)
        for _, tensor in ordered:
            for chunk in _chunks(as_bytes(tensor)):
                file.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one after the other, each into memory of its own.

    Args:
        path: A file whose ``contents`` have been looked at.
        names: What to read; all of them are in the file.
    """
    with path.open("rb") as file:
        slots = _slots(path, file)
        for name in names:
            yield name, _read_one(file, slots[name])


def contents(path: Path) -> dict[str, Slot]:
    """The tensors in a file by name, from its header.

    Raises:
        CheckpointError: the file is truncated or is not a safetensors file.
    """
    with path.open("rb") as file:
        return _slots(path, file)


def metadata(path: Path) -> dict[str, object]:
    """The free text that the header of a file carries, by key; empty if it carries none.

    Raises:
        CheckpointError: the file is truncated or is not a safetensors file.
    """
    with path.open("rb") as file:
        found = _entries(path, file)[0].get("__metadata__")
    return cast("dict[str, object]", found) if isinstance(found, dict) else {}


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of a dense tensor, in C order, little-endian, without a copy where possible."""
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return _view(plain)


def _view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(cast("Any", tensor.reshape(-1).view(torch.uint8).numpy()))


def _chunks(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]


def _header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_one(file: BinaryIO, slot: Slot) -> Tensor:
    tensor = torch.empty(slot.shape, dtype=slot.dtype)
    file.seek(slot.start)
    for chunk in _chunks(_view(tensor)):
        file.readinto(chunk)  # type: ignore[attr-defined]
    return tensor


def _slots(path: Path, file: BinaryIO) -> dict[str, Slot]:
    entries, start = _entries(path, file)
    entries.pop("__metadata__", None)
    slots = {name: _slot(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, slots, start, os.fstat(file.fileno()).st_size)
    return slots


def _entries(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """What the header says, and where the tensors begin."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path} is not a safetensors file: its header would be {length} B")
    if 8 + length > size:
        raise CheckpointError(f"{path} is truncated: {size} bytes, its header ends at {8 + length}")
    return _parse(path, file.read(length)), 8 + length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        loaded: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON object")
    return cast("dict[str, Any]", loaded)


def _slot(path: Path, name: str, entry: object, base: int) -> Slot:
    try:
        fields = cast("Mapping[str, Any]", entry)
        shape = tuple(int(size) for size in fields["shape"])
        start, end = (int(offset) for offset in fields["data_offsets"])
        slot = Slot(_TORCH[fields["dtype"]], shape, base + start, base + end)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header of {name!r} is damaged: {error!r}") from None
    if min(shape, default=0) < 0 or end - start != _nbytes(slot):
        raise CheckpointError(
            f"{path}: the header of {name!r} is damaged: {end - start} bytes for shape {shape}"
        )
    return slot


def _nbytes(slot: Slot) -> int:
    count = slot.dtype.itemsize
    for size in slot.shape:
        count *= size
    return count


def _check_layout(path: Path, slots: Mapping[str, Slot], base: int, size: int) -> None:
    """Raise unless the tensors fill the file exactly, back to back."""
    position = base
    for slot in sorted(slots.values(), key=lambda each: (each.start, each.end)):
        if slot.start != position:
            raise CheckpointError(f"{path} is damaged: its tensors overlap or leave gaps")
        position = slot.end
    if position != size:
        what = "truncated" if size < position else "damaged"
        raise CheckpointError(f"{path} is {what}: {size} bytes, its header says {position}")
