"""RefLoRA: refactored low-rank adaptation (arXiv 2505.18877)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from architectures.adapters.base import Init
from architectures.adapters.lora import LoRA, draw


@dataclass(frozen=True)
class Schedule:
    """At which steps factors are balanced.

    Attributes:
        warmup: The number of first steps that are left as they are, in which B leaves zero.
        interval: After those, every how many steps the rule acts.
    """

    warmup: int = 100
    interval: int = 1

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.interval < 1:
            raise ValueError(
                "warmup must be 0 or more and interval 1 or more, got "
                f"{self.warmup} and {self.interval}"
            )


@dataclass(frozen=True)
class RefLoRAOptions(Schedule):
    """How RefLoRA starts and when it acts.

    Attributes:
        re_init: Draw both factors at random, and take their product out of the weight, instead of
            starting with B = 0. Meant for ``warmup: 0``.
    """

    re_init: bool = False


class RefLoRA(LoRA):
    """LoRA whose gradients are those of its best factorisation.

    Of all ``P A``, ``B P⁻¹``, which have one product, the pair with equal Gram matrices is the one
    from which the step is taken: a rule around the optimizer's step replaces the gradients.
    Tensors, forward and merge are those of LoRA.
    """

    Options: ClassVar[type] = RefLoRAOptions
    step_rule: ClassVar[str | None] = "reflora"

    @classmethod
    def changes_base(cls, options: Any) -> bool:
        """Whether the factors that it starts from are taken out of the weight."""
        return options.re_init

    @torch.no_grad()
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Draw A, and zero B or with ``re_init`` draw it, uniformly within ±1/√rank."""
        super().start(init, generator, weight)
        if not self.options.re_init or self.lora_B.is_meta:
            return None
        if weight is None:
            raise ValueError("re_init needs the base weight, and there is none")
        self.lora_B.copy_(draw(self.lora_B.shape, "kaiming", generator))
        return self.rest(weight)
