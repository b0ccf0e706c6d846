"""RefLoRA-S: RefLoRA with one number for a matrix (arXiv 2505.18877)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from architectures.adapters.lora import LoRA


@dataclass(frozen=True)
class Options:
    """When RefLoRA-S acts.

    Attributes:
        warmup: The number of first steps that leave the factors alone.
        interval: After those, every how many steps the factors are balanced.
    """

    warmup: int = 100
    interval: int = 1

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.interval < 1:
            raise ValueError(
                "warmup must be 0 or more and interval 1 or more, got "
                f"{self.warmup} and {self.interval}"
            )


class RefLoRAS(LoRA):
    """LoRA whose factors are kept at equal norms, by a rule around the optimizer's step.

    Tensors, start, forward and merge are those of LoRA.
    """

    Options: ClassVar[type] = Options
    step_rule: ClassVar[str | None] = "reflora-s"
