"""Which statement of the model's own code is running."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from pathlib import Path

import torch

import architectures


class Where(str):
    """``file:line`` of a statement."""

    __slots__ = ()

    @property
    def file(self) -> str:
        """The source file."""
        return self.rpartition(":")[0]

    @property
    def line(self) -> int:
        """1-based line in the file."""
        return int(self.rpartition(":")[2])


NOWHERE = Where("<unknown>:0")
_LIBRARIES = (
    "<",
    str(Path(__file__).parent.parent) + "/",
    str(Path(architectures.__file__).parent) + "/",
    str(Path(torch.__file__).parent) + "/",
    contextlib.__file__,
    functools.__file__,
)
#: Models that lie beside what rewrites insert; their statements are a model's own.
_BACKBONES = str(Path(architectures.__file__).parent / "backbones") + "/"


@functools.lru_cache(maxsize=4096)
def is_library(filename: str) -> bool:
    """True for torch, this library and einops: a statement there is not the model's."""
    if filename.startswith(_BACKBONES):
        return False
    return filename.startswith(_LIBRARIES) or "/einops/" in filename


def user_line() -> Where:
    """The innermost running statement that belongs to the model's own code."""
    frame: types.FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if not is_library(frame.f_code.co_filename):
            return Where(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return NOWHERE


def raised_at(error: BaseException) -> Where:
    """The innermost of the model's own statements that an exception went through."""
    found = NOWHERE
    entry = error.__traceback__
    while entry is not None:
        filename = entry.tb_frame.f_code.co_filename
        if not is_library(filename):
            found = Where(f"{filename}:{entry.tb_lineno}")
        entry = entry.tb_next
    return found
