"""Step rules: what an inner step does with a gradient. Each is linear in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StepRule(ABC):
    """A linear function of the gradient, which may have meta-learned tensors of its own.

    Attributes:
        lr: Step size, or what learned ones start from.
    """

    lr: float

    @abstractmethod
    def update(self, extra: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensors:
        """What is taken from the parameters: by name, of their shapes."""

    def learned(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """What is meta-learned beside the parameters, as it starts; empty for nothing."""
        return {}


@dataclass(frozen=True)
class Shared(StepRule):
    """Gradient descent with one fixed step size (MAML, arXiv 1703.03400)."""

    def update(self, extra: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensors:
        """``lr · g``."""
        return {name: self.lr * value for name, value in gradient.items()}


@dataclass(frozen=True)
class PerParameter(StepRule):
    """A meta-learned step size for every scalar (Meta-SGD, arXiv 1707.09835).

    Its logarithm is learned, so that no step goes uphill.
    """

    PREFIX: ClassVar[str] = "log_lr:"

    def update(self, extra: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensors:
        """``exp(s) ⊙ g``."""
        return {n: torch.exp(extra[self.PREFIX + n]) * value for n, value in gradient.items()}

    def learned(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """``log lr`` for every scalar, in the parameters' shapes."""
        start = math.log(self.lr)
        return {self.PREFIX + n: torch.full_like(p, start) for n, p in parameters.items()}


@dataclass(frozen=True)
class Preconditioned(StepRule):
    """A meta-learned matrix for every mode of a tensor (Meta-Curvature, arXiv 1902.03356).

    A gradient (out, in, *kernel) is taken as (out, in, k) and multiplied along each of its modes;
    a vector has one mode, a scalar is multiplied with a scalar. The matrices start as identities.
    They cost out² + in² + k² numbers a tensor.
    """

    PREFIX: ClassVar[str] = "curvature:"

    def update(self, extra: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensors:
        """``lr · g ×₁ M₁ ×₂ M₂ ×₃ M₃``."""
        return {name: self.lr * self._multiplied(extra, name, g) for name, g in gradient.items()}

    def learned(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """Identities."""
        return {
            self._key(name, mode): torch.eye(size, dtype=p.dtype, device=p.device)
            for name, p in parameters.items()
            for mode, size in enumerate(_modes(p))
        }

    def _multiplied(self, extra: Mapping[str, Tensor], name: str, gradient: Tensor) -> Tensor:
        value = gradient.reshape(_modes(gradient))
        for mode in range(value.dim()):
            matrix = extra[self._key(name, mode)]
            value = (value.movedim(mode, -1) @ matrix.mT).movedim(-1, mode)
        return value.reshape(gradient.shape)

    def _key(self, name: str, mode: int) -> str:
        return f"{self.PREFIX}{mode}:{name}"


def _modes(tensor: Tensor) -> tuple[int, ...]:
    """Sizes of the modes that get a matrix: at most three."""
    if tensor.dim() <= 2:
        return tuple(tensor.shape) or (1,)
    return (*tensor.shape[:2], math.prod(tensor.shape[2:]))


#: Rule by the name that a configuration uses.
RULES: dict[str, type[StepRule]] = {
    "shared": Shared,
    "per-parameter": PerParameter,
    "preconditioned": Preconditioned,
}
