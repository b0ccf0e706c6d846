"""RefLoRA: the step of LoRA from the best of all factorisations.

Source: "RefLoRA: refactored low-rank adaptation for efficient fine-tuning of large models",
arXiv 2505.18877.

``B A = (B P⁻¹)(P A)`` for every invertible ``P``, but a step on the factors depends on ``P``.
RefLoRA takes the step from the pair whose Gram matrices are equal, and maps it back. With the
positive definite ``S`` that solves ``S (A Aᵀ) S = Bᵀ B`` that comes down to

    grad_A ← S⁻¹ grad_A        grad_B ← grad_B S

which a step of plain gradient descent makes independent of ``P``. What the optimizer makes of the
gradients, and its moments, stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.optim.linalg import balancing, rounded, wide
from surgery.optim.preconditioner import Preconditioner
from surgery.optim.rule import Factors


@torch.no_grad()
def precondition(
    lora_A: Tensor, lora_B: Tensor, grad_A: Tensor, grad_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients that RefLoRA gives to the optimizer.

    Products of the long factors are formed in float64 (float32 on MPS, which has no other), so
    that float32 factors of condition number 1e4 give 1e-6 of relative error at most. Where a
    factor is rank-deficient ``S`` is ``‖B‖ / ‖A‖`` times the identity, and where one is zero the
    gradients are returned as they are. Nothing waits for the device.

    Args:
        lora_A: A, ``(*batch, r, in)``; float16 and bfloat16 too.
        lora_B: B, ``(*batch, out, r)``.
        grad_A: The gradient of A, of its shape.
        grad_B: The gradient of B, of its shape.

    Returns:
        ``S⁻¹ grad_A`` and ``grad_B S``, in the dtypes of the gradients.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shapes(lora_A, lora_B, grad_A, grad_B)
    dtype = wide(lora_A.device)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    square = (*lora_A.shape[:-1], lora_A.shape[-2])
    batch = (-1, *square[-2:])
    S, inverse = balancing((A @ A.mT).reshape(batch), (B.mT @ B).reshape(batch))
    new_A = inverse.reshape(square) @ grad_A.to(dtype)
    new_B = grad_B.to(dtype) @ S.reshape(square)
    return rounded(new_A, grad_A.dtype), rounded(new_B, grad_B.dtype)


class RefLoRA(Preconditioner):
    """Replaces the gradients of the factors by those of ``precondition`` before a step.

    Args:
        factors: The adapters.
        warmup: The number of first steps with plain gradients.
        interval: After those, every how many steps gradients are replaced; the others are plain.

    Raises:
        ValueError: an option is out of range.
    """

    uphill = True

    def __init__(self, factors: Sequence[Factors], *, warmup: int = 100, interval: int = 1) -> None:
        super().__init__(factors)
        check_schedule(warmup, interval)
        self.warmup = warmup
        self.interval = interval

    def due(self) -> bool:
        """Whether the warm-up is over and the interval is."""
        since = self.steps - self.warmup
        return since >= 0 and since % self.interval == 0

    def matrices(self, gram_A: Tensor, gram_B: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
        """``S⁻¹`` and ``S``. The scaling cancels: it belongs to A and B alike."""
        S, inverse = balancing(gram_A, gram_B)
        return inverse, S


def check_schedule(warmup: int, interval: int) -> None:
    """Raise ValueError unless there can be such a warm-up and such an interval."""
    if warmup < 0 or interval < 1:
        raise ValueError(
            f"warmup must be 0 or more and interval 1 or more, got {warmup} and {interval}"
        )


def check_shapes(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> None:
    """Raise ValueError unless the four are the factors of an adapter and their gradients."""
    fit = A.dim() > 1 and A.shape[:-2] == B.shape[:-2] and A.shape[-2] == B.shape[-1]
    if fit and grad_A.shape == A.shape and grad_B.shape == B.shape:
        return
    shapes = ", ".join(str(tuple(each.shape)) for each in (A, B, grad_A, grad_B))
    raise ValueError(
        "lora_A must be (*batch, r, in), lora_B (*batch, out, r), and each gradient of its "
        f"factor's shape; got {shapes}"
    )
