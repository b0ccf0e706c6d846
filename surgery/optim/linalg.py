"""Small matrices of many adapters at once, in float64.

The factors of an adapter are long and thin, their Gram matrices ``A Aᵀ`` and ``Bᵀ B`` are
``rank × rank``. Here adapters of any shapes but of one rank become one batch of such matrices; the
long factors are read and gradients are written in chunks. Nothing waits for the device.

In float64 the Gram matrix of float32 factors of condition number 1e4 keeps eight digits of its
smallest eigenvalue; in float32 it would keep none. MPS has no float64, and float32 is used there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

_linalg = cast("Any", torch.linalg)  # it has no types

#: Numbers that are widened at a time where one kernel serves many adapters: enough to keep a
#: device busy without holding a float64 copy of all adapters.
CHUNK = 2**24

#: A pivot of the Cholesky factor whose square is below this share of the largest means that a
#: factor is rank-deficient as far as float64 can tell: a condition number of 4e6 and above.
DEFICIENT = 6e-14

#: The Newton iteration for the orthogonal polar factor takes 9 steps at a condition number of
#: 1e16, and one more settles the last digits.
_NEWTON_STEPS = 10


def wide(device: torch.device) -> torch.dtype:
    """The dtype of the small matrices: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def grams(factors: Sequence[Tensor], *, rows: bool) -> Tensor:
    """The Gram matrices of factors of one rank, ``(K, r, r)``, K counting every matrix.

    Args:
        factors: Each ``(*stack, r, in)``, or ``(*stack, out, r)``; any dtype.
        rows: Whether it is rows whose products are taken, as for A: ``A Aᵀ``; else ``Bᵀ B``.
    """
    dtype = wide(factors[0].device)
    if _one_by_one(factors):
        # A product of two matrices is up to twice as fast as one of two stacks of one.
        room = _Room(dtype)
        each = (room.widened(factor) for factor in factors)
        return joined([one @ one.mT if rows else one.mT @ one for one in each])
    found: list[Tensor] = [factors[0]] * len(factors)
    for chunk in _chunks(factors):
        chosen = [factors[index] for index in chunk]
        both = joined(chosen).to(dtype)
        products = both @ both.mT if rows else both.mT @ both
        for index, part in zip(chunk, _parted(products, chosen), strict=True):
            found[index] = part
    return joined(found)


@torch.no_grad()
def multiply_(tensors: Sequence[Tensor], matrices: Tensor, *, left: bool) -> None:
    """Multiply tensors by small matrices in place, forming the products in float64.

    Args:
        tensors: Each ``(*stack, r, in)``, or ``(*stack, out, r)``; any dtype.
        matrices: ``(K, r, r)``, in the order in which ``grams`` gives them.
        left: Whether the matrices stand on the left.
    """
    dtype = wide(tensors[0].device)
    each = _parted(matrices, tensors)
    if _one_by_one(tensors):
        room, made = _Room(dtype), _Room(dtype)
        for tensor, by in zip(tensors, each, strict=True):
            both, product = room.widened(tensor), made.like(tensor)
            torch.matmul(*((by, both) if left else (both, by)), out=product)
            tensor.copy_(_in_range(product, tensor.dtype))
        return
    for chunk in _chunks(tensors):
        chosen = [tensors[index] for index in chunk]
        both, by = joined(chosen).to(dtype), joined([each[index] for index in chunk])
        put(chosen, by @ both if left else both @ by)


@torch.no_grad()
def put(targets: Sequence[Tensor], values: Tensor) -> None:
    """Copy ``(K, m, n)`` values into tensors ``(*stack, m, n)``, rounding to their dtype."""
    parts = _parted(_in_range(values, targets[0].dtype), targets)
    cast("Any", torch)._foreach_copy_(list(targets), parts)


def balancing(gram_A: Tensor, gram_B: Tensor) -> tuple[Tensor, Tensor]:
    """The positive definite ``S`` with ``S (A Aᵀ) S = Bᵀ B``, and its inverse.

    It is the geometric mean of ``(A Aᵀ)⁻¹`` and ``Bᵀ B``. With ``A Aᵀ = L Lᵀ``, ``Bᵀ B = M Mᵀ``
    and ``W`` the orthogonal factor of the polar decomposition of ``Mᵀ L``,

        S = L⁻ᵀ Wᵀ Mᵀ        S⁻¹ = M⁻ᵀ W Lᵀ

    No eigenvalue is ever formed, so none can come out negative.

    Where a factor is rank-deficient no such ``S`` exists. There ``S`` is the best multiple of the
    identity, ``‖B‖ / ‖A‖``, and 1 where a factor is zero, as B is at the start.

    Args:
        gram_A: ``A Aᵀ``, ``(K, r, r)``.
        gram_B: ``Bᵀ B``, ``(K, r, r)``.

    Returns:
        ``S`` and ``S⁻¹``, both ``(K, r, r)``.
    """
    L, deficient_A = _cholesky(gram_A)
    M, deficient_B = _cholesky(gram_B)
    deficient = (deficient_A | deficient_B)[:, None, None]
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    S, inverse = _balancing(*(torch.where(deficient, identity, each) for each in (L, M)))
    ratio = (_trace(gram_B) / _trace(gram_A)).sqrt()
    usable = ratio.isfinite() & (ratio > 0)
    scalar = torch.where(usable, ratio, 1.0)[:, None, None]
    return (
        torch.where(deficient, scalar * identity, S),
        torch.where(deficient, identity / scalar, inverse),
    )


def _balancing(L: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    W = _orthogonal_factor(M.mT @ L)
    return _solve_upper(L.mT, W.mT @ M.mT), _solve_upper(M.mT, W @ L.mT)


def inverse_plus(gram: Tensor, eps: float) -> Tensor:
    """``(gram + eps I)⁻¹`` of positive semidefinite ``(K, r, r)``, with ``eps`` above 0."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # What rounding may have taken from the smallest eigenvalues of a singular one.
    slack = DEFICIENT * _trace(gram)[:, None, None]
    factor, _ = cast("tuple[Tensor, Tensor]", _linalg.cholesky_ex(gram + (eps + slack) * identity))
    return torch.cholesky_inverse(factor)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors ``(K, r, r)``, and which are not to be trusted, ``(K,)``."""
    factor, info = cast("tuple[Tensor, Tensor]", _linalg.cholesky_ex(gram))
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    # Written so that NaN counts as deficient.
    sound = pivots.amin(-1).square() > DEFICIENT * pivots.amax(-1).square()
    return factor, (info != 0) | ~sound


def _orthogonal_factor(matrices: Tensor) -> Tensor:
    """The orthogonal ``W`` of ``matrices = W H`` with ``H`` positive definite, ``(K, r, r)``.

    Newton's iteration ``X ← (γ X + X⁻ᵀ / γ) / 2`` with Higham's scaling γ. On the CPU, where to
    look costs nothing, it stops when it has converged.
    """
    found = matrices / _norm(matrices)
    settled = torch.finfo(found.dtype).eps ** 0.5  # the next step would square the distance
    for _ in range(_NEWTON_STEPS):
        inverse = cast("Tensor", _linalg.inv_ex(found)[0]).mT
        scale = (_norm(inverse) / _norm(found)).sqrt()
        moved = 0.5 * (scale * found + inverse / scale)
        if found.device.type == "cpu" and bool((moved - found).abs().amax() < settled):
            return moved
        found = moved
    return found


def _norm(matrices: Tensor) -> Tensor:
    return cast("Tensor", _linalg.matrix_norm(matrices, keepdim=True))


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _solve_upper(upper: Tensor, right: Tensor) -> Tensor:
    return cast("Tensor", _linalg.solve_triangular(upper, right, upper=True))


def _one_by_one(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing is gained by one kernel for many adapters."""
    return tensors[0].device.type == "cpu"


class _Room:
    """Memory for one tensor at a time of each shape: the next one takes it over.

    It stays in the processor's cache. Asking for it anew would take about a tenth of the time of
    all that is done here.

    Args:
        dtype: Of the memory.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._found: dict[torch.Size, Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor of this shape, with anything in it."""
        if tensor.shape not in self._found:
            self._found[tensor.shape] = torch.empty_like(
                tensor, dtype=self._dtype, memory_format=torch.contiguous_format
            )
        return self._found[tensor.shape]

    def widened(self, tensor: Tensor) -> Tensor:
        """The tensor in this dtype, until the next of its shape."""
        return tensor if tensor.dtype == self._dtype else self.like(tensor).copy_(tensor)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of the tensors to handle at a time: many of one shape and dtype."""
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, each in enumerate(tensors):
        alike.setdefault((each.shape, each.dtype), []).append(index)
    for indices in alike.values():
        count = max(1, CHUNK // tensors[indices[0]].numel())
        for start in range(0, len(indices), count):
            yield indices[start : start + count]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors ``(*stack, m, n)`` as one ``(K, m, n)``."""
    if all(each.dim() == 2 for each in tensors):
        return torch.stack(list(tensors))
    return torch.cat([each.reshape(-1, *each.shape[-2:]) for each in tensors])


def _parted(values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """``(K, m, n)`` as one tensor ``(*stack, m, n)`` for each of those that it came from."""
    if all(each.dim() == 2 for each in like):
        return list(values.unbind())
    parts = cast("Any", torch).split(values, [each.shape[:-2].numel() for each in like])
    return [
        part.view(*each.shape[:-2], *values.shape[-2:])
        for part, each in zip(parts, like, strict=True)
    ]


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype. What float16 has no room for becomes its largest, not inf."""
    return _in_range(values, dtype).to(dtype)


def _in_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.float16:
        return values
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit)
