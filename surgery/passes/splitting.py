"""Taking a part out of a weight, putting it back, and knowing the weight again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from architectures.adapters import Adapter
from surgery.errors import ModelStateError
from surgery.passes.payload import matrix_of, slices_of
from surgery.record import Contract, Edit

#: What is promised of a model whose weights were split into factors and a rest: each is rounded
#: to the weight's dtype, and the outputs move by that much in every layer.
CLOSE = {
    torch.float64: Contract("close", rtol=1e-9, atol=1e-9),
    torch.float32: Contract("close", rtol=1e-3, atol=1e-4),
    torch.float16: Contract("close", rtol=2e-2, atol=2e-2),
    torch.bfloat16: Contract("close", rtol=1e-1, atol=1e-1),
}


def rows_of(weight: nn.Parameter, edit: Edit) -> list[Tensor]:
    """The weight as a matrix; the rows of each slice where there are slices."""
    folded = matrix_of(edit).fold(weight.detach())
    slices = slices_of(edit)
    if not slices:
        return [folded]
    return [torch.cat([folded[a:b] for a, b in ranges]) for ranges in slices.values()]


@torch.no_grad()
def write_rows(weight: nn.Parameter, edit: Edit, values: Sequence[Tensor]) -> None:
    """Put values that ``rows_of`` would give into the weight."""
    matrix, slices = matrix_of(edit), slices_of(edit)
    if not slices:
        weight.data.copy_(matrix.unfold(values[0]))
        return
    folded = matrix.fold(weight.data).clone()
    for ranges, value in zip(slices.values(), values, strict=True):
        taken = 0
        for a, b in ranges:
            folded[a:b] = value[taken : taken + b - a]
            taken += b - a
    weight.data.copy_(matrix.unfold(folded))


@torch.no_grad()
def give_back(weight: nn.Parameter, edit: Edit, adapter: Adapter) -> None:
    """Add what an adapter took out of a weight that has no copy: for an apply that failed."""
    if adapter.beginning is None or weight.is_meta:
        return
    matrix = matrix_of(edit)
    taken = adapter.beginning.delta(torch.promote_types(weight.dtype, torch.float32))
    weight.data.copy_(weight + matrix.unfold(taken))


def told_of(edit: Edit, start: Callable[..., Tensor | None], *args: Any) -> Tensor | None:
    """Call a method's ``start``; what it cannot start from is told with the site.

    Raises:
        ModelStateError: the weight does not suit the method.
    """
    try:
        return start(*args)
    except ValueError as error:
        raise ModelStateError(
            f"{edit.site} cannot start as {edit.summary}: {error}",
            hint="repair the weight, leave the site out with except:, or use method: lora",
        ) from error


def digest_of(weight: Tensor) -> str:
    """The SHA-256 of the values of a tensor."""
    values = weight.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()
