"""What every low-rank adapter is: tensors beside one frozen weight, and how they change it.

All methods share one form. For a weight read as a matrix W (rows × columns)

    W' = gain ⊙ (W + scaling · B A)        A: rank × columns,  B: rows × rank

where ``gain`` is one number per row, or absent. A method says what its tensors are, how they
start, and what ``A``, ``B`` and ``gain`` are made of; where W sits in a layer (transposed,
convolutional, a stack of experts) is the business of whoever hosts the adapter.

A method whose factors start as a part of the weight takes that part out of it, so that the model
starts as it was. It keeps the factors of the start, B₀ and A₀: with them its change of the
original weight is ``scaling · (B A - B₀ A₀)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
    scales_rows: bool = False

    scaling: float
    dropout: float

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (*stack, rank, columns) and ``B`` (*stack, rows, rank)."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that it consists of, each with tensors of its own."""
        return ()

    @property
    def beginning(self) -> Adapter | None:
        """What was taken out of the weight at the start, as an adapter; None if nothing was."""
        return None

    def gain(self, weight: Tensor) -> Tensor:
        """One factor per row, ``(*stack, rows)``. Asked for only where ``scales_rows`` is set.

        Args:
            weight: The base weight as ``(*stack, rows, columns)``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not scale rows")

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """``scaling · B A``, ``(*stack, rows, columns)``.

        Args:
            dtype: What to compute in; the dtype of the factors by default.
        """
        A, B = self.factors()
        product = B @ A if dtype is None else B.to(dtype) @ A.to(dtype)
        return product * self.scaling

    def change(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``W' - W``, both ``(*stack, rows, columns)``.

        Args:
            weight: The base weight ``W``.
            dtype: What to compute in; the dtype of the factors by default.
        """
        delta = self.delta(dtype)
        if not self.scales_rows:
            return delta
        return self.gain(weight).unsqueeze(-1) * (weight + delta) - weight


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


class Method(Adapter):
    """An adapter with tensors of its own: what one published method comes down to.

    Args:
        matrix: How the weight is read as a matrix.
        rank: Rank of the change.
        scaling: Factor of ``B A``.
        dropout: Probability of dropping an input of the low-rank branch while training.
        options: An instance of ``Options``; the defaults if None.
        device: Where its tensors live: where the weight lives.
        dtype: Their dtype.

    Attributes:
        initial_A: What A was at the start, a buffer; only where ``changes_base`` says so.
        initial_B: The same of B.
        folded: Whether training has changed the base weight, a buffer of 0 or 1; only where
            ``folds_weight`` is set. The factors are of no use beside the original weight then.
    """

    #: The method's own options: a frozen dataclass from the standard library whose fields all
    #: have defaults, those of the paper.
    Options: ClassVar[type] = NoOptions
    #: Name under which ``surgery.registry.STEP_RULES`` has what the method does around the
    #: optimizer's step.
    step_rule: ClassVar[str | None] = None
    #: The ways of drawing A that ``start`` knows; none if it draws nothing.
    inits: ClassVar[tuple[Init, ...]] = ("kaiming", "gaussian")
    #: Whether ``start`` reads the weight, which a quantised one does not allow.
    reads_weight: ClassVar[bool] = False
    #: Whether ``start`` gives a new base weight, so that undo needs a copy of the old one.
    changes_weight: ClassVar[bool] = False
    #: Whether training adds to the base weight: undo needs a copy of it, and a quantised or a
    #: shared weight does not allow it. The start is that of any other method.
    folds_weight: ClassVar[bool] = False

    lora_A: nn.Parameter  # noqa: N815 - the name in every checkpoint
    lora_B: nn.Parameter  # noqa: N815 - the same
    initial_A: Tensor  # noqa: N815 - the same
    initial_B: Tensor  # noqa: N815 - the same
    folded: Tensor

    def __init__(
        self,
        matrix: Matrix,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        options: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scaling = scaling
        self.dropout = dropout
        self.options = self.Options() if options is None else options
        for name, shape in self.tensors(matrix, rank).items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        for name, shape in self.constants(matrix, rank, self.options).items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_buffer(name, empty)
        # In a tuple: as a child it would be a cycle, and its tensors are this module's.
        self._begun = (Beginning(self),) if self.changes_base(self.options) else ()

    @classmethod
    @abstractmethod
    def tensors(cls, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor of the method, ``lora_A`` and ``lora_B`` among them."""

    @classmethod
    def constants(cls, matrix: Matrix, rank: int, options: Any) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor that is saved and not trained."""
        if cls.folds_weight:
            return {"folded": ()}
        if not cls.changes_base(options):
            return {}
        return {
            "initial_A": (*matrix.stack, rank, matrix.columns),
            "initial_B": (*matrix.stack, matrix.rows, rank),
        }

    @classmethod
    def changes_base(cls, options: Any) -> bool:
        """Whether ``start`` gives a new base weight with these options."""
        return cls.changes_weight

    @abstractmethod
    def start(
        self, init: Init, generator: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Give the tensors their first values, in place; nothing on the meta device.

        Args:
            init: How ``A`` is drawn.
            generator: A CPU generator; numbers are drawn in float32 on the CPU, so that they
                depend neither on the device nor on the dtype.
            weight: The base weight as ``(*stack, rows, columns)`` where ``reads_weight`` is set
                or ``changes_base`` says so.

        Returns:
            The base weight to continue from, ``self.rest(weight)``, where ``changes_base`` says
            so; else None.

        Raises:
            ValueError: the weight is not what the method can start from; the message says why.
        """

    @torch.no_grad()
    def rest(self, weight: Tensor) -> Tensor:
        """The base weight without what the factors are now, which A₀ and B₀ are from now on.

        Args:
            weight: The base weight as ``(*stack, rows, columns)``.
        """
        A, B = self.factors()
        self.initial_A.copy_(A)
        self.initial_B.copy_(B)
        return self.without_beginning(weight)

    @torch.no_grad()
    def without_beginning(self, weight: Tensor) -> Tensor:
        """``weight - scaling · B₀ A₀``, formed in float32 at least, in the weight's dtype."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        taken = self.initial_B.to(wide) @ self.initial_A.to(wide)
        return torch.sub(weight.to(wide), taken, alpha=self.scaling).to(weight.dtype)

    @property
    def methods(self) -> tuple[Method, ...]:
        """Itself."""
        return (self,)

    @property
    def beginning(self) -> Adapter | None:
        """What was taken out of the weight at the start, as an adapter; None if nothing was."""
        return self._begun[0] if self._begun else None

    def plain(self) -> tuple[Tensor, Tensor]:
        """Factors of a LoRA of the same scaling on the original weight.

        Of a method that split the weight they have rank 2 r: ``[A; -A₀]`` (*stack, 2 r, columns)
        and ``[B, B₀]`` (*stack, rows, 2 r).
        """
        A, B = self.factors()
        if not self._begun:
            return A, B
        before_A, before_B = self._begun[0].factors()
        return torch.cat([A, -before_A], dim=-2), torch.cat([B, before_B], dim=-1)

    def penalty(self) -> Tensor | None:
        """A term for the loss, a scalar, or None."""
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (*stack, rank, columns) and ``B`` (*stack, rows, rank)."""
        return self.lora_A, self.lora_B

    def extra_repr(self) -> str:
        """Rank, scaling and dropout, for ``print(model)``."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Beginning(Adapter):
    """The factors that a method started from, read from it; it has no tensors of its own."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.scaling = method.scaling
        self.dropout = 0.0
        self._of = (method,)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A₀`` (*stack, rank, columns) and ``B₀`` (*stack, rows, rank)."""
        return self._of[0].initial_A, self._of[0].initial_B
