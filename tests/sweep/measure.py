"""What sweeps measure: outputs, distances, and what a model's own rounding amounts to."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.sources import Example


class Failure(AssertionError):
    """A check that did not hold; the message says how."""


def leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor of an output, however deeply nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif hasattr(value, "__dict__"):  # a dataclass such as a distribution or a decoder's output
        for item in vars(value).values():
            yield from leaves(item)


def run(model: nn.Module, example: Example) -> list[Tensor]:
    """The floating tensors of the output; draws the same noise in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(*example.args, **example.kwargs)
    return [leaf for leaf in leaves(output) if leaf.is_floating_point()]


def still(model: nn.Module, example: Example) -> list[Tensor]:
    """``run`` without gradients."""
    with torch.no_grad():
        return run(model, example)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two outputs agree bit for bit."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the size of the output it is in."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if b.numel():
            found = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
            worst = max(worst, math.inf if math.isnan(found) else found)
    return worst


def use_plain_experts(model: nn.Module) -> None:
    """Take the experts' forward that knows float64: grouped_mm, in the default one, does not."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


class Widened(TorchFunctionMode):
    """Within it, what a model casts to float32 by itself is cast to float64.

    A norm that computes in float32 whatever its input is rounds to 6e-8, which hides what is
    compared in float64 and makes differences over small steps useless.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        named = {
            name: torch.float64 if arg is torch.float32 else arg
            for name, arg in (kwargs or {}).items()
        }
        return func(*wide, **named)


def noise(model: nn.Module, example: Example, expected: list[Tensor]) -> float:
    """What the last bit of its weights changes: large if the model computes in less by itself."""
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.mul_(1 + 2e-16 * torch.randn_like(parameter).sign())
    return distance(still(nudged, example), expected)


def scalar(outputs: list[Tensor]) -> Tensor:
    """A sum in which every element of the outputs that requires a gradient has its own weight."""
    total = sum(
        (leaf * torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)).sum()
        for leaf in outputs
        if leaf.requires_grad
    )
    if not isinstance(total, Tensor):
        raise Failure("no output requires a gradient")
    return total


def backward(model: nn.Module, example: Example) -> None:
    """Accumulate the gradients of ``scalar``."""
    scalar(run(model, example)).backward()


def cause(error: Exception) -> str:
    """What went wrong and, unless a check said so itself, where."""
    if isinstance(error, Failure):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} [{Path(where.filename).name}:{where.lineno}]"
