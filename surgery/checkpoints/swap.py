"""Replace a folder in one step: whoever looks sees the old one whole or the new one whole.

The new folder is written beside the target, flushed to the disk, and exchanged with it by one
system call (``renameat2`` with ``RENAME_EXCHANGE`` on Linux, ``renamex_np`` with ``RENAME_SWAP``
on macOS). Where the file system has no such call, two renames do it; a kill between them leaves
no target but a whole old folder beside it, which the next save or restore moves back.

Working folders are locked by the process that writes them, so that the next save removes what a
killed process left and nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; RENAME_SWAP of macOS has the same value
#: What a file system without the call answers.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
#: What a network file system answers that cannot lock a folder.
_NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_HANDLE = -1

# Two renames must not interleave with those of another thread.
_placing = threading.Lock()


@contextmanager
def replacing(target: Path, check: Callable[[Path], None]) -> Generator[Path]:
    """A new empty folder that takes the place of ``target`` when the block ends without an error.

    Args:
        target: A folder, or a path where there is nothing yet; links are followed.
        check: Called with an existing, non-empty target; raises if it must not be replaced.

    Raises:
        CheckpointError: ``target`` is a file.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    tidy(target)
    _check_target(target, check)
    work, lock = _work_folder(target)
    try:
        yield work
        _flush(work)
        _check_target(target, check)
        with _placing:
            _put_in_place(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        _unlock(lock)


@contextmanager
def continuing(target: Path, check: Callable[[Path], None]) -> Generator[Path]:
    """As ``replacing``, in a folder that outlives an error or a kill: the next call goes on in it.

    Args:
        target: A folder, or a path where there is nothing yet; links are followed.
        check: Called with an existing, non-empty target; raises if it must not be replaced.

    Raises:
        CheckpointError: ``target`` is a file, or another process writes to it.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    tidy(target)
    _check_target(target, check)
    work = unfinished(target)
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise CheckpointError(f"{work} is in the way: it is no folder", hint="move it away")
    work.mkdir(exist_ok=True)
    lock = _lock(work)
    if lock is None:
        raise CheckpointError(f"another process is writing {target} at this moment")
    try:
        yield work
        _flush(work)
        _check_target(target, check)
        with _placing:
            _put_in_place(work, target)
    finally:
        _unlock(lock)


def unfinished(target: Path) -> Path:
    """The folder in which ``continuing`` prepares a target."""
    target = target.resolve()
    return target.parent / f".{target.name}.surgery-unfinished"


def recover(target: Path) -> None:
    """Move a whole old folder back if a kill between two renames left the target missing."""
    target = target.resolve()
    if target.exists() or not target.parent.is_dir():
        return
    for left in _left_over(target, "old"):
        lock = _lock(left)
        if lock is None:
            continue
        left.rename(target)
        _flush_folder(target.parent)
        _unlock(lock)
        logger.warning("recovered %s from an interrupted save", target)
        return


def tidy(target: Path) -> None:
    """Recover the target if need be, and remove what interrupted saves left beside it."""
    target = target.resolve()
    recover(target)
    for left in (*_left_over(target, "new"), *_left_over(target, "old")):
        lock = _lock(left)
        if lock is not None:
            _remove(left)
            _unlock(lock)


def _check_target(target: Path, check: Callable[[Path], None]) -> None:
    # One question, one answer: another thread may be putting a folder there at this moment.
    try:
        filled = any(target.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise CheckpointError(
            f"{target} is a file, expected a folder or a path to create one at"
        ) from None
    if filled:
        check(target)


def _beside(target: Path, kind: str) -> str:
    return f".{target.name}.surgery-{kind}-"


def _left_over(target: Path, kind: str) -> list[Path]:
    prefix = _beside(target, kind)
    return sorted(each for each in target.parent.iterdir() if each.name.startswith(prefix))


def _new_name(target: Path, kind: str) -> Path:
    return target.parent / f"{_beside(target, kind)}{secrets.token_hex(4)}"


def _work_folder(target: Path) -> tuple[Path, int]:
    """A new locked folder beside the target."""
    while True:
        work = _new_name(target, "new")
        work.mkdir()
        lock = _lock(work)
        # Another save may have taken it for a leftover before it was locked.
        if lock is not None and work.is_dir():
            return work, lock
        _unlock(lock)


def _put_in_place(work: Path, target: Path) -> None:
    if _move(work, target):
        _flush_folder(target.parent)
        return
    if _exchange(work, target):
        _flush_folder(target.parent)
        _remove(work)
        return
    old = _new_name(target, "old")
    lock = _lock(target)
    target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _flush_folder(target.parent)
    _remove(old)
    _unlock(lock)


def _move(work: Path, target: Path) -> bool:
    """Rename where nothing, or an empty folder, is in the way; False if something is."""
    try:
        work.rename(target)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        return False
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    call = _exchange_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform == "win32":
        return None
    library: Any = ctypes.CDLL(None, use_errno=True)
    path, number = ctypes.c_char_p, ctypes.c_uint
    try:
        if sys.platform == "darwin":
            swap = library.renamex_np
            swap.argtypes = [path, path, number]
            return lambda one, other: int(swap(one, other, _RENAME_EXCHANGE))
        swap = library.renameat2
    except AttributeError:
        return None  # musl and old glibc do not export it
    swap.argtypes = [ctypes.c_int, path, ctypes.c_int, path, number]
    return lambda one, other: int(swap(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE))


def _flush(folder: Path) -> None:
    """Flush every file of a folder, then the folder, to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Remove a folder that is no longer needed; the work is done, so a failure is only told."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("could not remove %s: %s", folder, error)


def _lock(folder: Path) -> int | None:
    """A handle that holds the folder's lock until it is closed; None while another holds it.

    Where folders cannot be locked (Windows, some network file systems) everybody gets the lock:
    there, two processes must not save to one path at the same time.
    """
    if sys.platform == "win32":
        return _NO_HANDLE
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(handle)
            raise
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None and handle != _NO_HANDLE:
        os.close(handle)
