"""Rules that multiply gradients by small matrices, all adapters of a rank at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from surgery.optim.linalg import CHUNK, grams, multiply_, wide
from surgery.optim.rule import Factors, StepRule, whole, write


class Preconditioner(StepRule):
    """``grad_A ← left grad_A`` and ``grad_B ← grad_B right``, both ``r × r``, from Gram matrices.

    Under FSDP2 the factors and their gradients, which are small, are gathered, and each rank keeps
    its part of the result.
    """

    @abstractmethod
    def matrices(self, gram_A: Tensor, gram_B: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
        """``left`` and ``right``, both ``(K, r, r)``.

        Args:
            gram_A: ``A Aᵀ`` of all adapters of one rank, ``(K, r, r)`` in float64.
            gram_B: ``Bᵀ B``, the same.
            scaling: Factor of ``B A``, ``(K, 1, 1)``.
        """

    def due(self) -> bool:
        """Whether gradients are to be changed in this step."""
        return True

    def before(self, optimizer: Optimizer) -> None:
        """Replace the gradients."""
        if not self.due():
            return
        for alike in by_rank(self.with_gradients()):
            self._act(alike)

    def _act(self, alike: Sequence[Factors]) -> None:
        grad_A = [gathered_gradient(each.A) for each in alike]
        grad_B = [gathered_gradient(each.B) for each in alike]
        left, right = self.matrices(
            grams([whole(each.A) for each in alike], rows=True),
            grams([whole(each.B) for each in alike], rows=False),
            scalings(alike),
        )
        multiply_(grad_A, left, left=True)
        multiply_(grad_B, right, left=False)
        for each, new_A, new_B in zip(alike, grad_A, grad_B, strict=True):
            if each.sharded:
                write(cast("Tensor", each.A.grad), new_A)
                write(cast("Tensor", each.B.grad), new_B)


def gathered_gradient(parameter: Tensor) -> Tensor:
    """The gradient itself; a gathered copy of a sharded one."""
    return whole(cast("Tensor", parameter.grad))


def by_rank(factors: Iterable[Factors]) -> list[list[Factors]]:
    """Adapters whose small matrices can be one batch: of one rank, on one device."""
    found: dict[tuple[int, torch.device], list[Factors]] = {}
    for each in factors:
        found.setdefault((each.rank, each.A.device), []).append(each)
    return list(found.values())


def by_shape(factors: Iterable[Factors]) -> list[list[Factors]]:
    """Adapters that can be one stack, as many as are widened at a time."""
    found: dict[tuple[torch.Size, torch.Size, torch.device], list[Factors]] = {}
    for each in factors:
        found.setdefault((each.A.shape, each.B.shape, each.A.device), []).append(each)
    return [
        alike[start : start + count]
        for alike in found.values()
        for count in [max(1, CHUNK // (alike[0].A.numel() + alike[0].B.numel()))]
        for start in range(0, len(alike), count)
    ]


def scalings(alike: Sequence[Factors]) -> Tensor:
    """The factor of ``B A`` of every matrix, ``(K, 1, 1)`` in float64; made without waiting."""
    values = {each.scaling for each in alike}
    counts = [each.A.shape[:-2].numel() for each in alike]
    device = alike[0].A.device
    if len(values) == 1:
        return torch.full((sum(counts), 1, 1), values.pop(), dtype=wide(device), device=device)
    flat = [each.scaling for each, n in zip(alike, counts, strict=True) for _ in range(n)]
    return torch.tensor(flat, dtype=wide(device))[:, None, None].to(device, non_blocking=True)
