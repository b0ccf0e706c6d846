"""Models wrapped by the peer libraries, with random adapters, and what they compute."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery import adapters
from surgery.exporting import outputs
from surgery.sources import Example

#: An output of float32 models by another order of the same sums: some roundings of 6e-8 each,
#: relative to the largest value, amplified by a few layers.
CLOSE = 5e-6


def stir(parameters: Iterable[tuple[str, Tensor]], *, seed: int = 0) -> None:
    """Give adapter tensors random values: magnitudes near their start, everything else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in parameters:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if "magnitude" in name:
                tensor.mul_(1 + 0.2 * noise.abs())
            else:
                tensor.add_(0.2 * noise)


def stirred(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A model with adapters of ours, trained in a manner of speaking."""
    inserted = {id(each) for each in adapters.parameters(model)}
    stir(((n, p) for n, p in model.named_parameters() if id(p) in inserted), seed=seed)
    return model


def in_peft(model: nn.Module, *, seed: int = 0, **config: Any) -> Any:
    """A copy of a model wrapped by PEFT, with a random adapter."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**config)).eval()
    stir(((n, p) for n, p in wrapped.named_parameters() if "lora_" in n), seed=seed)
    return wrapped


def by_peft(model: nn.Module, folder: Path) -> nn.Module:
    """What PEFT makes of a stock model and a folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def apart(one: nn.Module, other: nn.Module, example: Example) -> float:
    """The largest deviation of two models' outputs, relative to the largest value."""
    expected, found = outputs(one, example), outputs(other, example)
    assert expected.keys() == found.keys()
    assert expected
    return max(
        float((expected[path] - found[path]).abs().max() / expected[path].abs().max())
        for path in expected
    )
