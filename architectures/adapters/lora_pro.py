"""LoRA-Pro: steps that move the weight as its own gradient would (arXiv 2407.18242)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from architectures.adapters.lora import LoRA


@dataclass(frozen=True)
class LoRAProOptions:
    """How LoRA-Pro inverts.

    Attributes:
        delta: Added to the diagonals of the small matrices that are inverted.
    """

    delta: float = 1e-8

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta must be positive, got {self.delta}")


class LoRAPro(LoRA):
    """LoRA whose gradients are adjusted by a rule before the optimizer's step.

    Tensors, start, forward and merge are those of LoRA.
    """

    Options: ClassVar[type] = LoRAProOptions
    step_rule: ClassVar[str | None] = "lora-pro"
