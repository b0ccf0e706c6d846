"""Networks on whole tensors: one small matrix per dimension instead of one large for all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures.mirror.base import Shape, draw_uniform


class KroneckerLinear(nn.Module):
    """``x ×₁ W₁ ×₂ W₂ ... + bias``: a linear map whose matrix is a Kronecker product.

    Args:
        before: Shape of its input.
        after: Shape of its output, of as many dimensions.
        made_with: ``device`` and ``dtype`` of its parameters.

    Attributes:
        weights: One matrix ``(after, before)`` for each dimension.
        bias: In the shape of the output.
    """

    def __init__(self, before: Shape, after: Shape, made_with: dict[str, Any]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty((rows, columns), **made_with))
            for rows, columns in zip(after, before, strict=True)
        )
        self.bias = nn.Parameter(torch.empty(after, **made_with))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (*before) to (*after)."""
        *others, last = matrices(self)
        for mode, weight in enumerate(others):
            x = functional.linear(x.movedim(mode, -1), weight).movedim(-1, mode)
        return functional.linear(x, last) + self.bias

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None) -> None:
        """Draw all parameters so that outputs have the size of inputs (this project's choice)."""
        inputs = 1
        for weight in matrices(self):
            # Uniform within ±√3/√n has a variance of 1/n: each mode keeps the size of its input.
            draw_uniform(weight, math.sqrt(3 / weight.shape[1]), generator)
            inputs *= weight.shape[1]
        draw_uniform(self.bias, 1 / math.sqrt(inputs), generator)

    @torch.no_grad()
    def clear(self) -> None:
        """Set all parameters to zero."""
        for parameter in self.parameters():
            parameter.zero_()


class Encoder(nn.Module):
    """A tensor to a short vector: Kronecker layers, each followed by a ReLU.

    Args:
        sizes: Shape of the tensor, then what each layer makes of it.
        made_with: ``device`` and ``dtype`` of its parameters.
    """

    def __init__(self, sizes: Sequence[Shape], made_with: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_chain(sizes, made_with))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (*sizes[0]) to a vector of all numbers of sizes[-1]."""
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x.flatten()

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw all parameters."""
        for layer in _linears(self.layers):
            layer.draw(generator)


class Decoder(nn.Module):
    """A short vector to the logarithm of a scale and a shift for every number of a tensor.

    Args:
        sizes: Shape of the embedding, then what each layer makes of it; the tensor's own is last.
        made_with: ``device`` and ``dtype`` of its parameters.
    """

    def __init__(self, sizes: Sequence[Shape], made_with: dict[str, Any]) -> None:
        super().__init__()
        self.embedded = sizes[0]
        self.layers = nn.ModuleList(_chain(sizes[:-1], made_with))
        self.log_scale = KroneckerLinear(sizes[-2], sizes[-1], made_with)
        self.shift = KroneckerLinear(sizes[-2], sizes[-1], made_with)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Maps a vector to the log-scale and the shift, both ``(*sizes[-1])``."""
        x = functional.relu(embedding.reshape(self.embedded))
        for layer in self.layers:
            x = functional.relu(layer(x))
        return self.log_scale(x), self.shift(x)

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw all parameters but those of the two heads, which are zero: scale 1, shift 0."""
        for layer in _linears(self.layers):
            layer.draw(generator)
        self.log_scale.clear()
        self.shift.clear()


def matrices(layer: KroneckerLinear) -> list[Tensor]:
    """The matrices of a layer, read one by one by name, as ``functional_call`` swaps them."""
    return [getattr(layer.weights, str(mode)) for mode in range(layer.bias.dim())]


def _chain(sizes: Sequence[Shape], made_with: dict[str, Any]) -> Iterator[KroneckerLinear]:
    for before, after in itertools.pairwise(sizes):
        yield KroneckerLinear(before, after, made_with)


def _linears(layers: nn.ModuleList) -> Iterator[KroneckerLinear]:
    return iter(cast("Sequence[KroneckerLinear]", layers))
