"""Decompositions of a weight that low-rank methods start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

_linalg = cast("Any", torch.linalg)  # it has no types

#: Rounding leaves a basis of float32 about 1e-6 from orthonormal, a breakdown far more.
_SKEW = 1e-4

#: The randomised algorithm ends early once an iteration adds less than this share of energy: as
#: the gains shrink from one to the next, so do all that would follow.
_SETTLED = 1e-3


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


@dataclass(frozen=True)
class Decomposition:
    """How a method finds the singular vectors that it starts from.

    Attributes:
        svd: The ``exact`` decomposition, or a ``randomised`` one, which is much faster.
        iterations: Most iterations of the randomised one.
    """

    svd: Literal["exact", "randomised"] = "exact"
    iterations: int = 9

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {self.iterations}")

    def leading(self, weight: Tensor, rank: int, generator: torch.Generator | None) -> Triple:
        """As the function ``leading``, which says what is raised, by the chosen algorithm."""
        iterations = self.iterations if self.svd == "randomised" else None
        return leading(weight, rank, iterations=iterations, generator=generator)


def wide(weight: Tensor) -> Tensor:
    """The weight in float32 at least: there are no decompositions in half precision.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # One pass without temporaries: a sum is finite only if all its terms are.
    if not torch.isfinite(weight.sum(dtype=dtype)):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            count = weight.numel()
            raise ValueError(f"{bad} of the {count} values of the weight are NaN or infinite")
    return weight.to(dtype)


def leading(
    weight: Tensor,
    rank: int,
    *,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Triple:
    """The ``rank`` largest singular values of each matrix of a stack, with their vectors.

    Args:
        weight: ``(*stack, rows, columns)``.
        rank: How many.
        iterations: Most iterations of the randomised algorithm, block Krylov (Musco & Musco,
            arXiv 1504.05477); None computes the exact decomposition.
        generator: A CPU generator that the randomised algorithm draws its directions from.

    Raises:
        ValueError: a value is NaN or infinite; the decomposition does not converge; or a matrix
            has fewer singular values that are not zero.
    """
    matrices = wide(weight).reshape(-1, *weight.shape[-2:])
    # One by one: a decomposition needs several times the memory of its matrix.
    found = [_leading(each, rank, iterations, generator) for each in matrices]
    U, S, V = (torch.stack(parts) for parts in zip(*found, strict=True))
    stack = weight.shape[:-2]
    return Triple(*(each.reshape(*stack, *each.shape[1:]) for each in (U, S, V)))


def _leading(
    matrix: Tensor, rank: int, iterations: int | None, generator: torch.Generator | None
) -> Triple:
    try:
        if iterations is None:
            found = _decomposed(matrix)
        else:
            found = _randomised(matrix, rank, iterations, generator)
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
    matrix: Tensor, rank: int, iterations: int, generator: torch.Generator | None
) -> Triple:
    """The best approximation within the span of ``W Ω, (W Wᵀ) W Ω, ..., (W Wᵀ)^iterations W Ω``.

    Keeping every block finds more in 9 iterations than the power iteration of
    ``torch.svd_lowrank``, which keeps the last one only, does in 16 (benchmarks/svd_init.py). And
    that draws from the global generator, and other numbers on a GPU.
    """
    rows, columns = matrix.shape
    if rows > columns:
        # Bases of the shorter side are cheaper.
        found = _randomised(matrix.mT, rank, iterations, generator)
        return Triple(found.V.mT, found.S, found.U.mT)
    drawn = torch.randn(columns, rank, generator=generator)
    blocks = [orthonormal(matrix @ drawn.to(matrix))]
    images = [matrix.mT @ blocks[0]]
    gram = images[0].mT @ images[0]
    energy = _energy(gram, rank)
    for _ in range(iterations):
        blocks.append(_orthonormal_to(torch.cat(blocks, dim=1), matrix @ images[-1]))
        images.append(matrix.mT @ blocks[-1])
        gram = _grown(gram, images)
        before, energy = energy, _energy(gram, rank)
        if energy <= before * (1 + _SETTLED):
            break
    basis, image = torch.cat(blocks, dim=1), torch.cat(images, dim=1)
    if basis.shape[1] > rows or _skew(basis) > _SKEW:
        # The span has fewer dimensions than blocks were made for.
        basis = orthonormal(basis)
        image = matrix.mT @ basis
    # The decomposition of a long matrix by way of a square one.
    Q, R = cast("tuple[Tensor, Tensor]", _linalg.qr(image))
    small = _decomposed(R.mT)
    return Triple(basis @ small.U[:, :rank], small.S[:rank], small.V[:rank] @ Q.mT)


def _orthonormal_to(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of what a block adds to the span of a basis; twice is enough."""
    for _ in range(2):
        block = orthonormal(block - basis @ (basis.mT @ block))
    return block


def _grown(gram: Tensor, images: list[Tensor]) -> Tensor:
    """The Gram matrix of all images from that of all but the last."""
    new = torch.cat([each.mT @ images[-1] for each in images])
    before = gram.shape[0]
    return torch.cat([torch.cat([gram, new[:before]], dim=1), new.mT])


def _energy(gram: Tensor, rank: int) -> float:
    """The sum of the squares of the ``rank`` largest singular values found so far."""
    return float(cast("Tensor", _linalg.eigvalsh(gram))[-rank:].sum())


def _skew(basis: Tensor) -> float:
    """How far the columns are from orthonormal."""
    gram = basis.mT @ basis
    return float((gram - torch.eye(gram.shape[0]).to(gram)).abs().max())


def _decomposed(matrix: Tensor) -> Triple:
    return Triple(*cast("tuple[Tensor, Tensor, Tensor]", _linalg.svd(matrix, full_matrices=False)))


def orthonormal(span: Tensor) -> Tensor:
    """An orthonormal basis that the columns of matrices lie in: Q of their QR decomposition."""
    return cast("Tensor", _linalg.qr(span).Q)


def row_norms(matrix: Tensor) -> Tensor:
    """The norm of every row, ``(*stack, rows)``, without a temporary of the matrix's size."""
    return cast("Tensor", _linalg.vector_norm(matrix, dim=-1))


def frobenius(matrix: Tensor) -> Tensor:
    """The Frobenius norm of every matrix of a stack, ``(*stack,)``; its gradient at 0 is 0."""
    return cast("Tensor", _linalg.matrix_norm(matrix))
