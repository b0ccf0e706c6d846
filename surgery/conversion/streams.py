"""Bytes from file to file: in the kernel where they stay as they are, in pieces otherwise."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from surgery.errors import CheckpointError

#: Bytes per step of a copy: what is copied between two looks at whether to stop.
STEP = 1 << 25
_BUFFER = 1 << 22
#: Bytes that are asked for ahead of those that are read.
AHEAD = 1 << 24
#: What a file system, or two, answer that cannot copy in the kernel.
_NOT_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def copy(source: int, target: int, *, start: int, stop: int, at: int, path: Path) -> Iterator[int]:
    """Copy bytes ``start`` to ``stop`` of one file to byte ``at`` of another.

    Args:
        source: Handle of the file that is read.
        target: Handle of the file that is written.
        start: First byte.
        stop: Byte behind the last.
        at: Where to.
        path: The file that is read, for messages.

    Yields:
        How many bytes were copied, step by step.

    Raises:
        CheckpointError: the source ends early.
    """
    in_kernel = sys.platform == "linux"
    while start < stop:
        count = min(STEP, stop - start)
        done = _in_kernel(source, start, count, target, at) if in_kernel else None
        if done is None:
            in_kernel = False
            done = _through_memory(source, start, min(count, _BUFFER), target, at)
        if done == 0:
            raise _shorter(path)
        start, at = start + done, at + done
        yield done


def _in_kernel(source: int, start: int, count: int, target: int, at: int) -> int | None:
    """Bytes copied without passing through this process; None where that cannot be done."""
    try:
        return os.copy_file_range(source, target, count, start, at)
    except OSError as error:
        if error.errno in _NOT_IN_KERNEL:
            return None
        raise


def _through_memory(source: int, start: int, count: int, target: int, at: int) -> int:
    data = os.pread(source, count, start)
    write(target, memoryview(data), at)
    return len(data)


def expect(source: int, start: int, count: int) -> None:
    """Tell the system that bytes will be read soon, so that the disk works meanwhile."""
    if sys.platform == "linux":
        os.posix_fadvise(source, start, count, os.POSIX_FADV_WILLNEED)


def read(source: int, buffer: Tensor, start: int, path: Path) -> None:
    """Fill a contiguous tensor with the bytes of a file from ``start`` on.

    Raises:
        CheckpointError: the file ends early.
    """
    left = view(buffer)
    while left:
        count = os.preadv(source, [left], start)
        if count == 0:
            raise _shorter(path)
        left, start = left[count:], start + count


def write(target: int, data: memoryview, at: int) -> None:
    """Write all of ``data`` to a file from byte ``at`` on."""
    while data:
        count = os.pwrite(target, data, at)
        data, at = data[count:], at + count


def view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(cast("Any", tensor.reshape(-1).view(torch.uint8).numpy()))


def _shorter(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} got shorter while it was read",
        hint="wait until whatever writes it is done, and start again",
    )
