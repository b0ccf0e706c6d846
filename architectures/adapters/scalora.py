"""ScaLoRA: low-rank steps whose sum is of high rank (arXiv 2510.23818)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from architectures.adapters.base import Init
from architectures.adapters.lora import LoRA


class ScaLoRA(LoRA):
    """LoRA whose factors move on while it trains: what they let go is added to the weight.

    Before a step of the optimizer the columns of B and the rows of A are scaled so that the step
    comes as near as it can to one of full fine-tuning, and the weight takes in the difference::

        B <- B diag(α)     A <- diag(β) A     W <- W + s (B A - B diag(α β) A)

    The scaling is the business of a rule around the optimizer's step. Forward, start and merging
    are those of LoRA, but the factors are of no use without the weight that was trained with them.
    """

    @dataclass(frozen=True)
    class Options:
        """When and by how much factors are scaled.

        Attributes:
            interval: Steps from one scaling to the next: 1 is ScaLoRA, 10 the paper's ScaLoRA-I.
            lipschitz: L, the smoothness of the loss as a function of the weight; α² and β² are
                proportional to 1 / (L · learning rate). By default each weight gets its own at its
                first scaling: the one that leaves the factors together as large as they were.
            warmup: Steps before the first scaling.
        """

        interval: int = 1
        lipschitz: float | None = None
        warmup: int = 0

        def __post_init__(self) -> None:
            if self.interval < 1:
                raise ValueError(f"interval must be at least 1, got {self.interval}")
            if self.warmup < 0:
                raise ValueError(f"warmup must be at least 0, got {self.warmup}")
            given = self.lipschitz
            if given is not None and not (math.isfinite(given) and given > 0):
                raise ValueError(f"lipschitz must be a positive number, got {given}")

    step_rule: ClassVar[str | None] = "scalora"
    folds_weight: ClassVar[bool] = True

    options: Any

    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Draw A, zero B; nothing is folded yet."""
        self.folded.zero_()
        return super().start(init, generator, weight)
