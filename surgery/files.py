"""Files that are there whole or not at all, and what tells them apart."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

_CHUNK = 1 << 20


@contextmanager
def beside(path: Path) -> Generator[Path]:
    """Where to write a file that takes the place of ``path`` when the block ends without an error.

    It is flushed to the disk first: a kill at any moment leaves the old file or the new one. What
    several processes write at once does not mix; the last one to end wins.

    Args:
        path: In a folder that exists; a file there is replaced.

    Raises:
        OSError: the disk is full, or the folder is missing or cannot be written to. The old file
            stays as it was.
    """
    work = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield work
        with work.open("rb+") as file:
            os.fsync(file.fileno())
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file as ``beside`` does; text as UTF-8, its line ends as they are."""
    data = content.encode() if isinstance(content, str) else content
    with beside(path) as work:
        work.write_bytes(data)


def sha256_of(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """The SHA-256 of a file, in hex.

    Args:
        path: The file; read in pieces.
        advance: Told how many bytes were read, piece by piece.
    """
    digest = sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if advance is not None:
                advance(count)
    return digest.hexdigest()
