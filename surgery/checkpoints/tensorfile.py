"""Safetensors files, written and read one tensor at a time.

The safetensors package takes and gives whole dictionaries. Here a file is written from tensors
where they lie and hashed on the way, so that saving holds no second copy of the model, and read
into tensors that own aligned memory instead of views of a mapped file that may change later.

The format, and what a header may say: ``surgery.untrusted.header``.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from surgery.errors import CheckpointError
from surgery.untrusted.header import DTYPES, WIDTHS, Slot, header_of, read_header

__all__ = [
    "DTYPES",
    "WIDTHS",
    "Advance",
    "Slot",
    "as_bytes",
    "contents",
    "header_bytes",
    "in_order",
    "metadata",
    "read",
    "read_slot",
    "write",
    "write_unhashed",
]

_CHUNK = 1 << 24

Advance = Callable[[int], None]


def write(path: Path, tensors: Sequence[tuple[str, Tensor]], advance: Advance) -> str:
    """Write a new file and flush it to the disk.

    Args:
        path: Must not exist.
        tensors: Names and dense tensors on any device.
        advance: Told the number of bytes each time some were written.

    Returns:
        The SHA-256 of the file, in hex.
    """
    digest = sha256()
    _write(path, tensors, advance, digest.update)
    return digest.hexdigest()


def write_unhashed(path: Path, tensors: Sequence[tuple[str, Tensor]], advance: Advance) -> None:
    """As ``write``, for those who hash the file later."""
    _write(path, tensors, advance, len)


def _write(
    path: Path,
    tensors: Sequence[tuple[str, Tensor]],
    advance: Advance,
    told: Callable[[bytes | memoryview], object],
) -> None:
    ordered = in_order(tensors)
    with path.open("xb") as file:
        head = header_bytes(ordered)
        file.write(head)
        told(head)
        for _, tensor in ordered:
            for chunk in _chunks(as_bytes(tensor)):
                file.write(chunk)
                told(chunk)
                advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one after the other, each into memory of its own.

    Args:
        path: A file whose ``contents`` have been looked at.
        names: What to read; all of them are in the file.
    """
    with path.open("rb") as file:
        slots = header_of(path, file).slots
        for name in names:
            yield name, read_slot(path, file, slots[name])


def contents(path: Path) -> dict[str, Slot]:
    """The tensors in a file by name, from its header.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or is no safetensors file.
    """
    return read_header(path).slots


def metadata(path: Path) -> dict[str, str]:
    """The free text that the header of a file carries, by key; empty if it carries none.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or is no safetensors file.
    """
    return read_header(path).metadata


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


def in_order(tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Widest elements first, so that every tensor starts at a multiple of its element size."""
    return sorted(tensors, key=lambda pair: -pair[1].element_size())


def header_bytes(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    """The beginning of a file that holds tensors back to back; of those only the form is read."""
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


def read_slot(path: Path, file: BinaryIO, slot: Slot) -> Tensor:
    """One tensor of an open file, in memory of its own.

    Args:
        path: The file, for the message.
        file: Open for reading; left behind the tensor.
        slot: From the header of this file, so that its bytes are known to be there.

    Raises:
        CheckpointError: the file got shorter meanwhile.
    """
    tensor = torch.empty(slot.shape, dtype=slot.dtype)
    file.seek(slot.start)
    for chunk in _chunks(_view(tensor)):
        _read_into(path, file, chunk)
    return tensor


def _read_into(path: Path, file: BinaryIO, buffer: memoryview) -> None:
    filled: int = 0
    while filled < len(buffer):
        count = cast("Any", file).readinto(buffer[filled:])
        if not count:
            raise CheckpointError(f"{path} got shorter while it was read")
        filled += count
