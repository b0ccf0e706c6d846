"""What generated files for transformers tell its recorder of hidden states."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,  # pyright: ignore[reportPrivateUsage]
    _active_collector,  # pyright: ignore[reportPrivateUsage]
)


def records(module: Any) -> None:
    """Have it known by its new class, as by the stock one, what a module can record."""
    _CAN_RECORD_REGISTRY[module] = module._can_record_outputs


def recorded(before: Tensor, after: Tensor) -> None:
    """Put ``after`` where ``before``, this very object, was just recorded as a hidden state."""
    collected = cast("Any", _active_collector.get())
    states: Any = None if collected is None else collected.get("hidden_states")
    if states and states[-1] is before:
        states[-1] = after
