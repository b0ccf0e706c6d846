"""Adding adapters into the weight itself, and taking them out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.adapters import Adapter
from surgery.errors import ModelStateError
from surgery.passes.hosts.bank import Bank, Mix
from surgery.passes.hosts.hosting import is_plain
from surgery.passes.links import is_mapped
from surgery.tree import own_parameters

#: Follows a weight's name in the edit log where the plain name is taken by a copy from before a
#: method changed the weight.
BEFORE_MERGE = "@merge"


def mergeable(module: nn.Module, parameter: str, path: str) -> nn.Parameter:
    """The weight that adapters can be added into.

    Raises:
        ModelStateError: it is quantised, computed by a parametrization or a mirror map, or has no
            values.
    """
    weight = own_parameters(module).get(parameter)
    if weight is None:
        raise ModelStateError(
            f"the {parameter} of {path} is computed by a parametrization, so nothing can be "
            "merged into it",
            hint="call torch.nn.utils.parametrize.remove_parametrizations first, or keep the "
            "adapters apart",
        )
    if is_mapped(module, parameter):
        raise ModelStateError(
            f"the {parameter} of {path} is a dual: the model computes with what a map makes of it",
            hint="bake the map in first, with a rule of pass: freeze, or keep the adapters apart",
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
    adding = bank.contributions(mix)
    if adding:
        wide = torch.promote_types(weight.dtype, torch.float32)
        folded = bank.matrix.fold(weight.to(wide))
        changed = folded
        for adapter, share in adding:
            changed = changed + share * adapter.change(folded, dtype=wide)
        bank.gains = tuple(
            adapter.gain(folded) if adapter.scales_rows else None for adapter, _ in adding
        )
        weight.copy_(bank.matrix.unfold(changed))
    bank.merged = mix


@torch.no_grad()
def take_out(weight: nn.Parameter, bank: Bank, kept: Tensor | None) -> None:
    """Put the kept weight back, bit for bit; without one subtract what was merged.

    Raises:
        ModelStateError: rows were scaled, and by how much is not known any more, or by zero.
    """
    if kept is not None:
        weight.copy_(kept)
    elif bank.merged is not None and (added := bank.contributions(bank.merged)):
        weight.copy_(_without(weight, bank, added))
    bank.merged, bank.copied, bank.gains = None, False, ()


def _without(weight: Tensor, bank: Bank, added: list[tuple[Adapter, float]]) -> Tensor:
    """The weight as it was, formed in at least float32.

    What was merged is ``W' = W + Σ share (gain ⊙ (W + delta) - W)``, so ``W`` is
    ``(W' - Σ share gain ⊙ delta) / (1 + Σ share (gain - 1))``.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    left = bank.matrix.fold(weight.to(wide))
    if not any(adapter.scales_rows for adapter, _ in added):
        for adapter, share in added:
            left = left - share * adapter.delta(wide)
        return bank.matrix.unfold(left)
    if len(bank.gains) != len(added):
        raise ModelStateError(
            "rows of the weight were scaled when the adapters were merged, and by how much is not "
            "saved",
            hint="load the model as it was before; merging with keep_base: memory keeps a copy",
        )
    factor = left.new_ones(left.shape[:-1])
    for (adapter, share), scaled in zip(added, bank.gains, strict=True):
        gain = torch.ones_like(factor) if scaled is None else scaled.to(left)
        left = left - share * gain.unsqueeze(-1) * adapter.delta(wide)
        factor = factor + share * (gain - 1)
    if bool((factor == 0).any()):
        raise ModelStateError(
            "rows of the weight were scaled by zero when the adapters were merged, so they cannot "
            "be taken out again",
            hint="load the original weights; merging with keep_base: memory keeps a copy",
        )
    return bank.matrix.unfold(left / factor.unsqueeze(-1))
