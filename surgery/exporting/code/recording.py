"""What generated files for transformers tell its recorder of hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.utils.output_capturing import _active_collector  # pyright: ignore[reportPrivateUsage]


def recorded(before: Tensor, after: Tensor) -> None:
    """Put ``after`` where ``before``, this very object, was just recorded as a hidden state."""
    collected: Any = _active_collector.get()
    states = None if collected is None else collected.get("hidden_states")
    if states and states[-1] is before:
        states[-1] = after
