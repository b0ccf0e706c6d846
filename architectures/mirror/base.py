"""What every mirror map is: an invertible map from dual tensors to primal ones.

    phi = T(z)        z: what an inner loop steps on,  phi: what the model computes with

Mirror descent steps in the dual, ``z <- z - a · dL/dphi``, without the Jacobian of T; the
parameters of T itself are what is meta-learned (arXiv 2312.13486). Every map here starts as the
identity in every bit (save that a negative zero becomes a positive one), so that a model it is put
into computes as before. All numbers must be finite for that: some maps sum over them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NoOptions:
    """The options of a map that has none."""


class MirrorMap(nn.Module, ABC):
    """An invertible map of one or several tensors, identity at the start.

    It keeps nothing between calls and writes nowhere, so that it works under ``torch.func``
    (``vmap``, ``grad``, ``functional_call``) and in several threads.

    Args:
        shapes: Shapes of the tensors, in order.
        owners: For each tensor the number of the module that it belongs to; tensors of one module
            follow one another. One module for all by default.
        options: An instance of ``Options``; the defaults if None.
        device: Where its tensors live.
        dtype: Their dtype.

    Raises:
        ValueError: there is no tensor, one is empty, or an option does not suit them.
    """

    #: The map's own options: a frozen dataclass from the standard library whose fields all have
    #: defaults.
    Options: ClassVar[type] = NoOptions
    #: Whether what a tensor becomes depends on other tensors; if not, there is one tensor.
    couples: ClassVar[bool]

    def __init__(
        self,
        shapes: Sequence[Shape],
        *,
        owners: Sequence[int] | None = None,
        options: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.owners = (0,) * len(self.shapes) if owners is None else tuple(owners)
        self.options = self.Options() if options is None else options
        _check(self.shapes, self.owners, one=not self.couples)
        self._build({"device": device, "dtype": dtype})

    @abstractmethod
    def _build(self, made_with: dict[str, Any]) -> None:
        """Register the parameters, for ``self.shapes``, ``self.owners`` and ``self.options``.

        Args:
            made_with: ``device`` and ``dtype``, as factories of tensors take them.
        """

    @abstractmethod
    def start(self, generator: torch.Generator | None) -> None:
        """Give the parameters their first values, those of the identity; nothing on meta.

        Args:
            generator: A CPU generator; numbers are drawn in float32 on the CPU, so that they
                depend neither on the device nor on the dtype.
        """

    @abstractmethod
    def forward(self, *dual: Tensor) -> tuple[Tensor, ...]:
        """``T(z)``: the primal tensors, each in the shape of its dual.

        Args:
            dual: One tensor for each of ``shapes``, in the dtype of the map's parameters.
        """

    @abstractmethod
    def dual(self, *primal: Tensor) -> tuple[Tensor, ...]:
        """The inverse: the dual tensors that ``forward`` maps to the given ones.

        Args:
            primal: One tensor for each of ``shapes``.
        """

    def one(self, index: int, *dual: Tensor) -> Tensor:
        """``forward(*dual)[index]``, with no more work than that one needs."""
        return self(*dual)[index]

    def extra_repr(self) -> str:
        """How many tensors and numbers it maps, for ``print(model)``."""
        count = sum(math.prod(shape) for shape in self.shapes)
        tensors = "1 tensor" if len(self.shapes) == 1 else f"{len(self.shapes)} tensors"
        return f"{tensors}, {count} numbers"


def _check(shapes: Sequence[Shape], owners: Sequence[int], *, one: bool) -> None:
    if not shapes or (one and len(shapes) > 1):
        wanted = "one tensor" if one else "at least one tensor"
        raise ValueError(f"the map is for {wanted}, got {len(shapes)}")
    empty = next((shape for shape in shapes if 0 in shape), None)
    if empty is not None:
        raise ValueError(f"a tensor of shape {list(empty)} has no numbers to map")
    if len(owners) != len(shapes):
        raise ValueError(f"{len(shapes)} tensors have {len(owners)} owners")


def modes_of(shape: Shape) -> Shape:
    """A shape with one to three dimensions, by which a map factors over a tensor.

    The positions of a convolution's kernel are one dimension, whatever its rank; a scalar is a
    vector of one.
    """
    if not shape:
        return (1,)
    if len(shape) <= 3:
        return shape
    return (shape[0], shape[1], math.prod(shape[2:]))


def outer_sum(vectors: Sequence[Tensor]) -> Tensor:
    """``(a, b, ...)`` of vectors ``(a,)``, ``(b,)``, ...: every sum of one element of each."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = total.unsqueeze(-1) + vector
    return total


@torch.no_grad()
def draw_uniform(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill a tensor from within ±bound; the numbers are drawn in float32 on the CPU."""
    tensor.copy_(torch.rand(tensor.shape, generator=generator).mul_(2 * bound).sub_(bound))
