"""NoRA: a Nyström-like initialisation (github.com/BingcongLi/NoRA)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from architectures.adapters.base import Init
from architectures.adapters.decompositions import wide
from architectures.adapters.lora import LoRA


class NoRA(LoRA):
    """LoRA whose A starts as a random sketch of the weight; the weight stays as it is.

    With Ω (rank x rows) drawn from a standard normal distribution and s the scaling::

        A = sigma · Ω W / s     B = 0

    The repository as published assigns the sketch where no parameter reads it, and before the
    pretrained weights are loaded, so that it trains LoRA's own start; this is what it describes.
    """

    @dataclass(frozen=True)
    class Options:
        """The size of the start.

        Attributes:
            sigma: Factor of the sketch; the authors take 0.02 for LLaMA-7B.
        """

        sigma: float = 0.02

        def __post_init__(self) -> None:
            if not (math.isfinite(self.sigma) and self.sigma > 0):
                raise ValueError(f"sigma must be a positive number, got {self.sigma}")

    inits: ClassVar[tuple[Init, ...]] = ()
    reads_weight: ClassVar[bool] = True

    options: Any

    @torch.no_grad()
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Sketch the weight, zero B."""
        if weight is None or weight.is_meta:
            return None
        matrix = wide(weight)
        drawn = torch.randn((*self.lora_A.shape[:-1], matrix.shape[-2]), generator=generator)
        sketch = drawn.to(matrix) @ matrix * (self.options.sigma / self.scaling)
        if not bool(sketch.abs().amax((-2, -1)).all()):
            raise ValueError("the weight is zero, and so is its sketch: nothing would be trained")
        self.lora_A.copy_(sketch)
        self.lora_B.zero_()
        return None


class NoRAPlus(NoRA):
    """NoRA with the gradients of the factors preconditioned by each other's Gram matrix."""

    step_rule: ClassVar[str | None] = "nora-plus"
