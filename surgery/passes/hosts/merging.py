"""Adding adapters into the weight itself, and taking them out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.errors import ModelStateError
from surgery.passes.hosts.bank import Bank, Mix
from surgery.passes.hosts.hosting import is_plain
from surgery.tree import own_parameters


def mergeable(module: nn.Module, parameter: str, path: str) -> nn.Parameter:
    """The weight that adapters can be added into.

    Raises:
        ModelStateError: it is quantised, computed by a parametrization, or has no values.
    """
    weight = own_parameters(module).get(parameter)
    if weight is None:
        raise ModelStateError(
            f"the {parameter} of {path} is computed by a parametrization, so nothing can be "
            "merged into it",
            hint="call torch.nn.utils.parametrize.remove_parametrizations first, or keep the "
            "adapters apart",
        )
    if not is_plain(weight):
        raise ModelStateError(
            f"the {parameter} of {path} is a {type(weight).__name__} of {weight.dtype}: merging "
            "into a quantised or sharded weight would round the adapters away",
            hint="merge into the unquantised model, then quantise it; or keep the adapters apart",
        )
    if weight.is_meta:
        raise ModelStateError(
            f"the {parameter} of {path} is on the meta device and has no values to merge into",
            hint="load the weights first",
        )
    return weight


@torch.no_grad()
def merge_into(weight: nn.Parameter, bank: Bank, mix: Mix) -> None:
    """Add a mix of adapters into a weight, rounding once."""
    if mix:
        weight.copy_(_shifted(weight, bank, mix, 1.0))
    bank.merged = mix


@torch.no_grad()
def take_out(weight: nn.Parameter, bank: Bank, kept: Tensor | None) -> None:
    """Put the kept weight back, bit for bit; without one subtract what was merged."""
    if kept is not None:
        weight.copy_(kept)
    elif bank.merged:
        weight.copy_(_shifted(weight, bank, bank.merged, -1.0))
    bank.merged, bank.copied = None, False


def _shifted(weight: Tensor, bank: Bank, mix: Mix, sign: float) -> Tensor:
    """The weight plus ``sign`` times the change, formed in at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    folded = bank.matrix.fold(weight.to(wide))
    changed = folded
    for name, share in mix:
        adapter = bank.adapters[name]
        changed = changed + sign * share * adapter.change(folded, dtype=wide)
    return bank.matrix.unfold(changed)
