"""AltLoRA: alternating projections of the gradient (arXiv 2505.12455)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from architectures.adapters.lora import LoRA


@dataclass(frozen=True)
class AltLoRAOptions:
    """How AltLoRA steps. The authors' values are not known: the defaults are this project's.

    Attributes:
        eps: Added to the diagonals of the small matrices that are inverted.
        beta: How much of the momentum stays from step to step; 0 for none.
        period: Steps with one factor before it is the other one's turn.
    """

    eps: float = 1e-6
    beta: float = 0.9
    period: int = 1

    def __post_init__(self) -> None:
        if not (self.eps > 0 and 0 <= self.beta < 1 and self.period >= 1):
            raise ValueError(
                "eps must be positive, beta from 0 to below 1 and period 1 or more, got "
                f"{self.eps}, {self.beta} and {self.period}"
            )


class AltLoRA(LoRA):
    """LoRA of which one factor moves at a time, by a rule around the optimizer's step.

    Tensors, start, forward and merge are those of LoRA.
    """

    Options: ClassVar[type] = AltLoRAOptions
    step_rule: ClassVar[str | None] = "altlora"
