"""RefLoRA-S: the factors are kept at equal norms.

Source: "RefLoRA: refactored low-rank adaptation for efficient fine-tuning of large models",
arXiv 2505.18877. Of RefLoRA's matrices only multiples of the identity are allowed, so that the best
is a single number, ``s = ‖B‖ / ‖A‖``, and the change of factors can be carried out:

    A ← √s A        B ← B / √s

``B A`` stays as it is, and the optimizer's moments follow: first moments of A by ``1/√s``, second
ones by ``1/s``, those of B the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from surgery.optim.linalg import wide
from surgery.optim.moments import check_state, powers_of, scale_state
from surgery.optim.preconditioner import by_rank
from surgery.optim.reflora import check_schedule
from surgery.optim.rule import Attached, Factors, StepRule, local, whole


@torch.no_grad()
def rescaling(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """``√(‖B‖ / ‖A‖)``, ``(*batch)`` in float64: what A is to be multiplied by, and B divided.

    It is 1 where a factor is zero, as B is at the start, since no number makes the norms equal.

    Args:
        lora_A: A, ``(*batch, r, in)``.
        lora_B: B, ``(*batch, out, r)``.
    """
    dtype = wide(lora_A.device)
    return _root(_norm(lora_A, dtype), _norm(lora_B, dtype))


class RefLoRAS(StepRule):
    """Multiplies A and divides B by one number after a step, so that their norms are equal.

    Before the first step after the warm-up the factors that are there are changed likewise, with
    their gradients. An adapter with a factor that is zero is left alone.

    Args:
        factors: The adapters.
        warmup: The number of first steps that leave the factors alone.
        interval: After those, every how many steps the factors are changed.

    Raises:
        ValueError: an option is out of range.
    """

    uphill = True

    def __init__(self, factors: Sequence[Factors], *, warmup: int = 100, interval: int = 1) -> None:
        super().__init__(factors)
        check_schedule(warmup, interval)
        self.warmup = warmup
        self.interval = interval

    def before(self, optimizer: Optimizer) -> None:
        """Balance what the first step after the warm-up starts from."""
        if self.steps == self.warmup:
            self._balance(optimizer, gradients=True)

    def after(self, optimizer: Optimizer) -> None:
        """Balance what the step has made."""
        since = self.steps + 1 - self.warmup
        if since > 0 and since % self.interval == 0:
            self._balance(optimizer, gradients=False)

    def attach(self, optimizer: Optimizer) -> Attached:
        """As for every rule; raises ModelStateError for an optimizer that is not supported."""
        powers_of(optimizer)
        return super().attach(optimizer)

    def _balance(self, optimizer: Optimizer, *, gradients: bool) -> None:
        acting = self.with_gradients()
        for each in acting:
            check_state(optimizer, each.A)
            check_state(optimizer, each.B)
        for alike in by_rank(acting):
            A, B = [whole(each.A) for each in alike], [whole(each.B) for each in alike]
            for each, root in zip(alike, _rescalings(A, B), strict=True):
                _change(optimizer, each.A, root, gradients=gradients)
                _change(optimizer, each.B, 1 / root, gradients=gradients)


def _rescalings(A: Sequence[Tensor], B: Sequence[Tensor]) -> list[Tensor]:
    """``rescaling`` of every adapter, ``(*stack, 1, 1)``, or a number where there is no stack."""
    if any(each.dim() > 2 for each in A):
        return [rescaling(a, b)[..., None, None] for a, b in zip(A, B, strict=True)]
    dtype = wide(A[0].device)
    norms_A, norms_B = (torch.stack(_norms(each, dtype)) for each in (A, B))
    return list(_root(norms_A, norms_B).unbind())


def _norm(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return cast("Any", torch.linalg).vector_norm(factor, dim=(-2, -1), dtype=dtype)


def _norms(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """One number for each, by few kernels."""
    return list(cast("Any", torch)._foreach_norm(list(matrices), 2, dtype))


def _root(norm_A: Tensor, norm_B: Tensor) -> Tensor:
    root = (norm_B / norm_A).sqrt()
    return torch.where(root.isfinite() & (root > 0), root, 1.0)


def _change(optimizer: Optimizer, factor: Tensor, by: Tensor, *, gradients: bool) -> None:
    """Multiply a factor; what is made of its gradients goes the other way."""
    local(factor).mul_(by)
    if gradients:
        local(cast("Tensor", factor.grad)).div_(by)
    scale_state(optimizer, factor, 1 / by)
