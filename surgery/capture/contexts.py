"""The thread state that torch calls depend on: whether gradients are on, and autocast.

A forward may change it for some of its statements (``with torch.no_grad():``). A trace compares
the state at each call with the state it began with, whatever context manager made the change.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch


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
