"""JSON from elsewhere, read strictly: one meaning, bounded memory, or an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn, cast

from surgery.errors import CheckpointError, SurgeryError
from surgery.untrusted.paths import checked_file, short

#: The largest document that is read unless a caller says otherwise, in bytes.
LIMIT = 100_000_000
# What an object or a list, and any other value, cost in Python at the least, in bytes.
_PER_CONTAINER = 64
_PER_VALUE = 40
# Headers and indexes of real checkpoints cost at most 8 bytes for each of their own.
_MOST_PER_BYTE = 12
_NEVER_MIND = 1 << 20


def read_object(
    path: Path,
    *,
    error: type[SurgeryError] = CheckpointError,
    limit: int = LIMIT,
    infinities: bool = False,
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: A regular file; a pipe or a device is refused and not opened.
        error: What is raised.
        limit: The most bytes that it may have.
        infinities: See ``parse``.

    Raises:
        SurgeryError: of the kind ``error``; the file is missing, too large, or holds anything
            but one JSON object (see ``parse``).
    """
    data = read_bytes(path, error=error, limit=limit)
    return parse_object(data, str(path), error=error, infinities=infinities)


def read_bytes(
    path: Path, *, error: type[SurgeryError] = CheckpointError, limit: int = LIMIT
) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        SurgeryError: of the kind ``error``; it is missing, no regular file, or too large.
    """
    size = checked_file(path, error=error).st_size
    if size > limit:
        raise error(f"{path} has {size} bytes, expected at most {limit}")
    with path.open("rb") as file:
        # It may have grown since it was looked at.
        return file.read(limit)


def parse_object(
    data: bytes,
    where: str,
    *,
    error: type[SurgeryError] = CheckpointError,
    infinities: bool = False,
) -> dict[str, Any]:
    """The JSON object that ``data`` is, as ``parse`` reads it."""
    loaded = parse(data, where, error=error, infinities=infinities)
    if not isinstance(loaded, dict):
        raise error(f"{where}: expected a JSON object, got {type(loaded).__name__}")
    return cast("dict[str, Any]", loaded)


def parse(
    data: bytes,
    where: str,
    *,
    error: type[SurgeryError] = CheckpointError,
    infinities: bool = False,
) -> object:
    """The JSON value that ``data`` is.

    Python's reader takes more than JSON, and lets the last of several equal keys win, where
    another program may take the first: what was checked would not be what is used. Here both are
    refused.

    Args:
        data: UTF-8 without a byte order mark.
        where: What it is called in the message.
        error: What is raised.
        infinities: Whether ``NaN``, ``Infinity`` and ``-Infinity`` may stand for numbers, as they
            do in the configurations of transformers.

    Raises:
        SurgeryError: of the kind ``error``; it is not UTF-8, not JSON, too deeply nested, has a
            key twice, NaN, an infinity or half of a surrogate pair, or is so dense that reading
            it would take many times its own size.
    """
    _check_density(data, where, error)
    try:
        loaded: object = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=float if infinities else _no_number,
            parse_float=_finite,
        )
        if b"\\u" in data:
            json.dumps(loaded, ensure_ascii=False).encode("utf-8")  # half a pair cannot be encoded
    except RecursionError:
        raise error(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as found:
        raise error(f"{where}: not valid JSON: {short(str(found))}") from None
    return loaded


def _check_density(data: bytes, where: str, error: type[SurgeryError]) -> None:
    """Refuse text that is mostly punctuation: 100 MB of ``[],`` would take 2 GB as objects."""
    if len(data) <= _NEVER_MIND:
        return
    containers = data.count(b"{") + data.count(b"[")
    values = data.count(b",")
    if _PER_CONTAINER * containers + _PER_VALUE * values > _MOST_PER_BYTE * len(data):
        raise error(
            f"{where}: {len(data)} bytes of JSON with {containers} brackets and {values} commas, "
            "which is not what a checkpoint's files look like"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"the key {short(repr(twice))} is there twice")


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{short(text)} is too large a number")
    return value
