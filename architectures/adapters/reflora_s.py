"""RefLoRA-S: RefLoRA with one number for a matrix (arXiv 2505.18877)."""

from __future__ import annotations

from typing import ClassVar

from architectures.adapters.lora import LoRA
from architectures.adapters.reflora import Schedule


class RefLoRAS(LoRA):
    """LoRA whose factors are kept at equal norms, by a rule around the optimizer's step.

    Tensors, start, forward and merge are those of LoRA.
    """

    Options: ClassVar[type] = Schedule
    step_rule: ClassVar[str | None] = "reflora-s"
