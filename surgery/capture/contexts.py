"""The thread state that torch calls depend on: whether gradients are on, and autocast.

A forward may change it for some of its statements (``with torch.no_grad():``). A trace compares
the state at each call with the state it began with, whatever context manager made the change.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import NamedTuple

import torch

from surgery.capture import private


class NoGrad(NamedTuple):
    """``torch.no_grad()``."""

    def __str__(self) -> str:
        return "torch.no_grad()"


class Autocast(NamedTuple):
    """``torch.autocast(device_type, dtype=dtype, enabled=enabled)``."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    def __str__(self) -> str:
        return f"torch.autocast({self.device_type!r}, dtype={self.dtype}, enabled={self.enabled})"


Change = NoGrad | Autocast


class Checkpointed(NamedTuple):
    """One call of ``torch.utils.checkpoint``; ``region`` tells one from another."""

    region: int
    use_reentrant: bool
    preserve_rng_state: bool


class Checkpoints:
    """Finds the ``torch.utils.checkpoint`` call that is running, by its frame on the stack."""

    def __init__(self) -> None:
        self._base = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        self._regions: dict[types.FrameType, Checkpointed] = {}
        self._entered: set[Checkpointed] = set()

    def running(self) -> Checkpointed | None:
        """The outermost call since this object was made; None outside any."""
        found: types.FrameType | None = None
        frame: types.FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        while frame is not None and frame is not self._base:
            found = frame if frame.f_code is private.CHECKPOINT_CODE else found
            frame = frame.f_back
        return None if found is None else self._region(found)

    def _region(self, frame: types.FrameType) -> Checkpointed:
        if frame not in self._regions:
            asked = frame.f_locals
            self._regions[frame] = Checkpointed(
                len(self._regions), bool(asked["use_reentrant"]), bool(asked["preserve_rng_state"])
            )
        return self._regions[frame]

    def entering(self) -> bool:
        """True the first time it is asked inside a re-entrant call."""
        running = self.running()
        if running is None or not running.use_reentrant or running in self._entered:
            return False
        self._entered.add(running)
        return True

    def forget(self) -> None:
        """Let go of the frames."""
        self._regions.clear()


_DEVICE_TYPES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Ambient:
    """The state around a forward: autocast per device type. Gradients are on during a trace."""

    autocast: tuple[Autocast, ...]

    @staticmethod
    def now() -> Ambient:
        """The state of this thread."""
        return Ambient(_autocast())

    def changes(self) -> tuple[Change, ...]:
        """The context managers that lead from this state to the present one."""
        grad = () if torch.is_grad_enabled() else (NoGrad(),)
        return (*grad, *(now for now in _autocast() if now not in self.autocast))


def _autocast() -> tuple[Autocast, ...]:
    return tuple(
        Autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in _DEVICE_TYPES
    )
