"""What a graph takes as it is."""

from __future__ import annotations

import enum
import types
from typing import Any

import torch

_STATIC = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    range,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    enum.Enum,
    types.FunctionType,
    types.BuiltinFunctionType,
)


def is_static(value: Any) -> bool:
    """True for what a graph takes as it is: its value belongs to the signature of a call."""
    return isinstance(value, _STATIC) or value is Ellipsis or value is NotImplemented
