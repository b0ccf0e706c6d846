"""Decompositions of a weight that low-rank methods start from."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

_linalg = cast("Any", torch.linalg)  # it has no types


class Triple(NamedTuple):
    """The leading part of a singular value decomposition, ``U diag(S) V``.

    Attributes:
        U: Left vectors, ``(*stack, rows, rank)``.
        S: Singular values, largest first, ``(*stack, rank)``.
        V: Right vectors as rows, ``(*stack, rank, columns)``.
    """

    U: Tensor
    S: Tensor
    V: Tensor


def wide(weight: Tensor) -> Tensor:
    """The weight in float32 at least: there are no decompositions in half precision.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(f"{bad} of the {weight.numel()} values of the weight are NaN or infinite")
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def leading(
    weight: Tensor,
    rank: int,
    *,
    iterations: int | None = None,
    oversampling: int = 8,
    generator: torch.Generator | None = None,
) -> Triple:
    """The ``rank`` largest singular values of each matrix of a stack, with their vectors.

    Args:
        weight: ``(*stack, rows, columns)``.
        rank: How many.
        iterations: Power iterations of the randomised algorithm (Halko et al., arXiv 0909.4061,
            algorithms 4.4 and 5.1); None computes the exact decomposition.
        oversampling: Directions beyond ``rank`` that the randomised algorithm follows.
        generator: A CPU generator that the randomised algorithm draws its directions from.

    Raises:
        ValueError: a value is NaN or infinite; the decomposition does not converge; or a matrix
            has fewer singular values that are not zero.
    """
    matrices = wide(weight).reshape(-1, *weight.shape[-2:])
    # One by one: a decomposition needs several times the memory of its matrix.
    found = [_leading(each, rank, iterations, oversampling, generator) for each in matrices]
    U, S, V = (torch.stack(parts) for parts in zip(*found, strict=True))
    stack = weight.shape[:-2]
    return Triple(*(each.reshape(*stack, *each.shape[1:]) for each in (U, S, V)))


def _leading(
    matrix: Tensor,
    rank: int,
    iterations: int | None,
    oversampling: int,
    generator: torch.Generator | None,
) -> Triple:
    try:
        if iterations is None:
            found = _decomposed(matrix)
        else:
            found = _randomised(matrix, rank + oversampling, iterations, generator)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage, reportUnknownMemberType, reportUnknownVariableType]
        raise ValueError(f"the singular value decomposition failed: {error}") from error
    negligible = found.S[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    nonzero = int((found.S[:rank] > negligible).sum())
    if nonzero < rank:
        raise ValueError(
            f"the weight has {nonzero} singular values that are not zero, and rank {rank} needs "
            f"{rank}: factors of zero would never be trained"
        )
    return Triple(found.U[:, :rank], found.S[:rank], found.V[:rank])


def _randomised(
    matrix: Tensor, size: int, iterations: int, generator: torch.Generator | None
) -> Triple:
    """``torch.svd_lowrank`` draws from the global generator, and other numbers on a GPU."""
    rows, columns = matrix.shape
    size = min(size, rows, columns)
    drawn = torch.randn(columns, size, generator=generator)
    basis = orthonormal(matrix @ drawn.to(matrix))
    for _ in range(iterations):
        basis = orthonormal(matrix @ orthonormal(matrix.mT @ basis))
    small = _decomposed(basis.mT @ matrix)
    return Triple(basis @ small.U, small.S, small.V)


def _decomposed(matrix: Tensor) -> Triple:
    return Triple(*cast("tuple[Tensor, Tensor, Tensor]", _linalg.svd(matrix, full_matrices=False)))


def orthonormal(span: Tensor) -> Tensor:
    """An orthonormal basis of the columns of tall matrices: Q of their QR decomposition."""
    return cast("Tensor", _linalg.qr(span).Q)


def row_norms(matrix: Tensor) -> Tensor:
    """The norm of every row, ``(*stack, rows)``, without a temporary of the matrix's size."""
    return cast("Tensor", _linalg.vector_norm(matrix, dim=-1))


def frobenius(matrix: Tensor) -> Tensor:
    """The Frobenius norm of every matrix of a stack, ``(*stack,)``; its gradient at 0 is 0."""
    return cast("Tensor", _linalg.matrix_norm(matrix))
