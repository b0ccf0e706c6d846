"""LoRA-Pro: the gradients of the factors that move the weight as its own gradient would.

Source: "LoRA-Pro: are low-rank adapters properly optimized?", arXiv 2407.18242.

A step on the factors along ``g_A`` and ``g_B`` moves ``W' = W + s B A`` along
``g = s (B g_A + g_B A)``. The ``g`` nearest to the gradient of ``W'`` is reached by

    g_A = (Bᵀ B)⁻¹ grad_A / s² + X A
    g_B = (I - B (Bᵀ B)⁻¹ Bᵀ) grad_B (A Aᵀ)⁻¹ / s² - B X

for every ``X`` (r, r), which changes ``g_A`` and ``g_B`` but not ``g``. The one is taken that
leaves them nearest to the gradients that were there:

    (Bᵀ B) X + X (A Aᵀ) = -(Bᵀ B)⁻¹ grad_A Aᵀ / s²
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from surgery.optim.linalg import inverse_plus, joined, rounded, wide
from surgery.optim.preconditioner import by_shape, gathered_gradient, scalings
from surgery.optim.reflora import check_shapes
from surgery.optim.rule import Factors, StepRule, whole, write


@torch.no_grad()
def adjust(
    lora_A: Tensor,
    lora_B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    delta: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """The gradients that LoRA-Pro gives to the optimizer, formed in float64.

    While B is zero, as at the start, ``g_A`` is ``grad_A`` (zero then) and ``X`` is zero.

    Args:
        lora_A: A, ``(*batch, r, in)``.
        lora_B: B, ``(*batch, out, r)``.
        grad_A: The gradient of A, of its shape.
        grad_B: The gradient of B, of its shape.
        scaling: s, the factor of ``B A``; a tensor is broadcast against the batch.
        delta: Added to the diagonals of the matrices that are inverted.

    Returns:
        ``g_A`` and ``g_B``, in the dtypes of the gradients.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shapes(lora_A, lora_B, grad_A, grad_B)
    dtype = wide(lora_A.device)
    A, B, old_A, old_B = (each.to(dtype) for each in (lora_A, lora_B, grad_A, grad_B))
    square = torch.as_tensor(scaling, dtype=dtype, device=A.device)[..., None, None] ** 2
    gram_A, gram_B = A @ A.mT, B.mT @ B
    inverse_A, inverse_B = (_inverse(gram, delta) for gram in (gram_A, gram_B))
    X = sylvester(gram_B, gram_A, -inverse_B @ (old_A @ A.mT) / square, delta)
    started = (gram_B != 0).flatten(-2).any(-1)[..., None, None]
    new_A = torch.where(started, inverse_B @ old_A / square + X @ A, old_A)
    along_B = inverse_B @ (B.mT @ old_B) @ inverse_A / square + X
    new_B = old_B @ inverse_A / square - torch.where(started, B @ along_B, 0.0)
    return rounded(new_A, grad_A.dtype), rounded(new_B, grad_B.dtype)


def sylvester(left: Tensor, right: Tensor, target: Tensor, delta: float) -> Tensor:
    """``X`` with ``left X + X right = target``, all ``(*batch, r, r)``.

    Args:
        left: Symmetric, positive semidefinite.
        right: The same.
        target: The right-hand side.
        delta: Added to every sum of an eigenvalue of ``left`` and one of ``right``.
    """
    values_left, Q = _eigh(left)
    values_right, R = _eigh(right)
    sums = values_left[..., :, None] + values_right[..., None, :]
    return Q @ ((Q.mT @ target @ R) / (sums.clamp(min=0) + delta)) @ R.mT


class LoRAPro(StepRule):
    """Replaces the gradients of the factors by those of ``adjust`` before a step.

    The eigenvalues of the small matrices are the one thing for which the host waits: twice a step
    for all adapters of one shape.

    Args:
        factors: The adapters.
        delta: Added to the diagonals of the matrices that are inverted.

    Raises:
        ValueError: ``delta`` is not positive.
    """

    def __init__(self, factors: Sequence[Factors], *, delta: float = 1e-8) -> None:
        super().__init__(factors)
        if not delta > 0:
            raise ValueError(f"delta must be positive, got {delta}")
        self.delta = delta

    def before(self, optimizer: Optimizer) -> None:
        """Replace the gradients."""
        for alike in by_shape(self.with_gradients()):
            self._adjust(alike)

    def _adjust(self, alike: Sequence[Factors]) -> None:
        new_A, new_B = adjust(
            joined([whole(each.A) for each in alike]),
            joined([whole(each.B) for each in alike]),
            joined([gathered_gradient(each.A) for each in alike]),
            joined([gathered_gradient(each.B) for each in alike]),
            scaling=scalings(alike)[:, 0, 0],
            delta=self.delta,
        )
        count = alike[0].A.shape[:-2].numel()
        for index, each in enumerate(alike):
            own = slice(index * count, (index + 1) * count)
            write(cast("Tensor", each.A.grad), new_A[own].view(each.A.shape))
            write(cast("Tensor", each.B.grad), new_B[own].view(each.B.shape))


def _inverse(gram: Tensor, delta: float) -> Tensor:
    flat = gram.reshape(-1, *gram.shape[-2:])
    return inverse_plus(flat, delta).reshape(gram.shape)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", cast("Any", torch.linalg).eigh(matrices))
