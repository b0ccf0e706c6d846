"""What tests of presets share: a call, a count, and a step away from the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery import Example


def count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def moved(model: nn.Module) -> None:
    """Leave the start, where a DiT's blocks are the identity and comparisons would say nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.02 * torch.randn(each.shape, generator=generator))


def called(model: nn.Module, example: Example) -> Tensor:
    output: Any = model(*example.args, **example.kwargs)
    return output if isinstance(output, Tensor) else output[0]
