"""What the first argument of a checkpointing function stands for."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn


def block_of(target: Any) -> nn.Module | None:
    """The module that a call of ``target`` runs.

    Args:
        target: A module, its bound ``forward`` or ``__call__``, or a `functools.partial` of one of
            these (nested ones too).

    Returns:
        The module, or None if ``target`` is anything else.
    """
    while type(target) is functools.partial:
        target = target.func
    if isinstance(target, types.MethodType):
        runs = target.__name__ in {"forward", "__call__", "_call_impl", "_wrapped_call_impl"}
        target = target.__self__ if runs else None
    return target if isinstance(target, nn.Module) else None
