"""The header of a safetensors file, checked against the file before anything is allocated.

Format: https://huggingface.co/docs/safetensors, an 8-byte little-endian length, a JSON header of
that length, then the tensors' bytes back to back.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from surgery.errors import CheckpointError
from surgery.untrusted.documents import parse_object
from surgery.untrusted.paths import checked_file, short

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
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
#: In the format, but of elements that share a byte, which a tensor of torch cannot hold as such.
_SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # the limit of the safetensors package
_MAX_NUMBER = 1 << 63  # beyond it torch cannot count
_MAX_DIMENSIONS = 64  # the limit of torch's own kernels
#: How a file begins that Git LFS left in place of a large one.
GIT_LFS = b"version "


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in a file: bytes ``start`` to ``end`` from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds.

    Attributes:
        slots: Its tensors by name, in the order of the header.
        metadata: Its free text by key.
        start: Where the tensors begin.
        size: The file's size, which the tensors fill exactly.
    """

    slots: dict[str, Slot]
    metadata: dict[str, str]
    start: int
    size: int


def read_header(path: Path) -> Header:
    """Read and check a file's header; none of its tensors is read.

    Raises:
        CheckpointError: the file is missing, no regular file, truncated, longer than its header
            says, or no safetensors file; or its header lies: numbers that are none, are negative
            or too large, a size that is not that of the shape, tensors that overlap or leave
            gaps, an unknown dtype, a name twice.
    """
    checked_file(path)
    with path.open("rb") as file:
        return header_of(path, file)


def header_of(path: Path, file: BinaryIO) -> Header:
    """As ``read_header``, of a file that is open at its beginning."""
    size = os.fstat(file.fileno()).st_size
    entries, start = _entries(path, file, size)
    metadata = _metadata(path, entries.pop(_METADATA, {}))
    slots = {name: _slot(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, slots, start, size)
    return Header(slots, metadata, start, size)


def _entries(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """What the header says, and where the tensors begin."""
    lead = file.read(8)
    if lead == GIT_LFS:
        raise git_lfs_pointer(path)
    if len(lead) < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", lead)
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path} is not a safetensors file: its header would be {length} B")
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes, its header ends at {8 + length}",
            hint="download or copy the file again",
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON object")
    return parse_object(text, f"{path} is not a safetensors file"), 8 + length


def git_lfs_pointer(path: Path) -> CheckpointError:
    """What to raise for a file that is a pointer of Git LFS."""
    return CheckpointError(
        f"{path} is a Git LFS pointer, not the weights", hint="run `git lfs pull` in its folder"
    )


def _metadata(path: Path, found: object) -> dict[str, str]:
    given = short(repr(found))
    texts = cast("dict[str, object]", found) if isinstance(found, dict) else None
    if texts is None or not all(isinstance(value, str) for value in texts.values()):
        raise CheckpointError(f"{path}: its {_METADATA} is damaged: expected text, got {given}")
    return cast("dict[str, str]", texts)


def _slot(path: Path, name: str, entry: object, base: int) -> Slot:
    fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    if set(fields) != _FIELDS:
        raise _damaged(path, name, f"expected {', '.join(sorted(_FIELDS))}, got {entry!r}")
    dtype = _dtype(path, name, fields["dtype"])
    shape = _numbers(path, name, "shape", fields["shape"])
    offsets = _numbers(path, name, "data_offsets", fields["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, name, f"data_offsets {offsets}, expected a start and an end")
    if len(shape) > _MAX_DIMENSIONS:
        raise _damaged(path, name, f"{len(shape)} dimensions, expected at most {_MAX_DIMENSIONS}")
    slot = Slot(dtype, shape, base + offsets[0], base + offsets[1])
    if slot.nbytes != _expected_bytes(path, name, dtype, shape):
        raise _damaged(path, name, f"{slot.nbytes} bytes for shape {shape} of {fields['dtype']}")
    return slot


def _dtype(path: Path, name: str, given: object) -> torch.dtype:
    if isinstance(given, str) and given in _TORCH:
        return _TORCH[given]
    if isinstance(given, str) and given in _SUB_BYTE:
        raise CheckpointError(
            f"{path}: {short(repr(name))} is of dtype {given}, whose elements share bytes; torch "
            "has no tensor of them",
            hint="use weights in a dtype of whole bytes, such as BF16 or F8_E4M3",
        )
    raise _damaged(path, name, f"the dtype {given!r}, expected one of {', '.join(_TORCH)}")


def _numbers(path: Path, name: str, field: str, given: object) -> tuple[int, ...]:
    numbers = cast("list[object]", given) if isinstance(given, list) else [given]
    # A bool is an int in Python, and 1.0 equals 1: neither is what the format has.
    if isinstance(given, list) and all(
        type(number) is int and 0 <= number < _MAX_NUMBER for number in numbers
    ):
        return tuple(cast("list[int]", numbers))
    raise _damaged(path, name, f"the {field} {given!r}, expected whole numbers from 0 to 2**63-1")


def _expected_bytes(path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count, reach = dtype.itemsize, dtype.itemsize
    for size in shape:
        count *= size
        reach *= max(size, 1)
        # An empty tensor needs no byte, and still strides that torch can count.
        if reach >= _MAX_NUMBER:
            raise _damaged(path, name, f"shape {shape} is larger than any memory")
    return count


def _damaged(path: Path, name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: the header of {short(repr(name))} is damaged: {short(reason)}")


def _check_layout(path: Path, slots: Mapping[str, Slot], base: int, size: int) -> None:
    """Raise unless the tensors fill the file exactly, back to back."""
    position = base
    for slot in sorted(slots.values(), key=lambda each: (each.start, each.end)):
        if slot.start != position:
            raise CheckpointError(f"{path} is damaged: its tensors overlap or leave gaps")
        position = slot.end
    if position != size:
        what = "truncated" if size < position else "damaged"
        raise CheckpointError(
            f"{path} is {what}: {size} bytes, its header says {position}",
            hint="download or copy the file again",
        )
