"""What every low-rank adapter is: tensors beside one frozen weight, and how they change it.

All methods share one form. For a weight read as a matrix W (rows × columns)

    W' = gain ⊙ (W + scaling · B A)        A: rank × columns,  B: rows × rank

where ``gain`` is one number per row, or absent. A method says what its tensors are, how they
start, and what ``A``, ``B`` and ``gain`` are made of; where W sits in a layer (transposed,
convolutional, a stack of experts) is the business of whoever hosts the adapter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Init = Literal["kaiming", "gaussian"]


@dataclass(frozen=True)
class Matrix:
    """How a weight tensor is read as a matrix, or as a stack of matrices.

    Attributes:
        shape: Shape of the weight as it is stored.
        stack: Leading dimensions, each element a matrix of its own, such as ``(experts,)``.
        rows: Rows of the matrix; output features of a linear layer or a convolution.
        columns: Columns; input features times kernel positions of a convolution.
        transposed: Whether the weight is stored as columns × rows, as GPT-2's Conv1D does.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    rows: int
    columns: int
    transposed: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], *, stacked: bool, transposed: bool = False) -> Matrix:
        """Read a weight of two or more dimensions.

        Args:
            shape: Shape of the weight.
            stacked: Whether all but the last two dimensions count matrices; otherwise all but
                the first are columns, as in a convolution.
            transposed: Whether a two-dimensional weight is stored columns × rows.
        """
        if stacked:
            return cls(shape, shape[:-2], shape[-2], shape[-1])
        rows, columns = shape[0], math.prod(shape[1:])
        if transposed:
            rows, columns = columns, rows
        return cls(shape, (), rows, columns, transposed)

    @property
    def max_rank(self) -> int:
        """The largest rank a change of this matrix can have."""
        return min(self.rows, self.columns)

    def fold(self, weight: Tensor) -> Tensor:
        """The stored weight as ``(*stack, rows, columns)``."""
        if self.transposed:
            return weight.T
        return weight.reshape(*self.stack, self.rows, self.columns)

    def unfold(self, matrix: Tensor) -> Tensor:
        """``(*stack, rows, columns)`` back to the shape the weight is stored in."""
        return matrix.T if self.transposed else matrix.reshape(self.shape)


class Adapter(nn.Module, ABC):
    """A change of one weight, as its host reads it. It is never called.

    Attributes:
        scaling: Factor of ``B A``.
        dropout: Probability of dropping an input of the low-rank branch while training.
    """

    #: Whether the method has a ``gain``; its host must then be able to read the weight.
    scales_rows: ClassVar[bool] = False

    scaling: float
    dropout: float

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (*stack, rank, columns) and ``B`` (*stack, rows, rank)."""

    def gain(self, weight: Tensor) -> Tensor:
        """One factor per row, ``(*stack, rows)``. Asked for only where ``scales_rows`` is set.

        Args:
            weight: The base weight as ``(*stack, rows, columns)``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not scale rows")

    def change(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``W' - W``, both ``(*stack, rows, columns)``.

        Args:
            weight: The base weight ``W``.
            dtype: What to compute in; the dtype of the factors by default.
        """
        A, B = self.factors()
        product = B @ A if dtype is None else B.to(dtype) @ A.to(dtype)
        delta = product * self.scaling
        if not self.scales_rows:
            return delta
        return self.gain(weight).unsqueeze(-1) * (weight + delta) - weight


class Method(Adapter):
    """An adapter with tensors of its own: what one published method comes down to.

    Args:
        matrix: How the weight is read as a matrix.
        rank: Rank of the change.
        scaling: Factor of ``B A``.
        dropout: Probability of dropping an input of the low-rank branch while training.
        device: Where its tensors live: where the weight lives.
        dtype: Their dtype.
    """

    #: Whether ``start`` reads the weight, which a quantised one does not allow.
    reads_weight: ClassVar[bool] = False
    #: Whether ``start`` gives a new base weight, so that undo needs a copy of the old one.
    changes_weight: ClassVar[bool] = False

    lora_A: nn.Parameter  # noqa: N815 - the name in every checkpoint
    lora_B: nn.Parameter  # noqa: N815 - the same

    def __init__(
        self,
        matrix: Matrix,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scaling = scaling
        self.dropout = dropout
        for name, shape in self.tensors(matrix, rank).items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))

    @classmethod
    @abstractmethod
    def tensors(cls, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor of the method, ``lora_A`` and ``lora_B`` among them."""

    @abstractmethod
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Give the tensors their first values, in place; nothing on the meta device.

        Args:
            init: How ``A`` is drawn.
            generator: A CPU generator; numbers are drawn in float32 on the CPU, so that they
                depend neither on the device nor on the dtype.
            weight: The base weight as ``(*stack, rows, columns)`` where ``reads_weight`` is set.

        Returns:
            The base weight to continue from where ``changes_weight`` is set, else None.
        """

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (*stack, rank, columns) and ``B`` (*stack, rows, rank)."""
        return self.lora_A, self.lora_B

    def extra_repr(self) -> str:
        """Rank, scaling and dropout, for ``print(model)``."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
