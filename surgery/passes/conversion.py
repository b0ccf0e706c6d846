"""Adapters that split their weight, as plain LoRA of twice the rank on the original weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from architectures.adapters import LoRA, Method, Sliced
from surgery.errors import ModelStateError
from surgery.passes.base import ApplyContext, passes_of
from surgery.passes.hosts import Bank, has_folded
from surgery.passes.links import links_of
from surgery.passes.lowrank import LowRank
from surgery.record import Edit, Operation, Record


@dataclasses.dataclass(frozen=True)
class _Split:
    """An edit whose adapter split its weight."""

    operation: Operation
    index: int
    made: LowRank

    @property
    def edit(self) -> Edit:
        return self.operation.edits[self.index]


def to_plain(model: nn.Module, record: Record, adapter: str | None) -> int:
    """Convert the adapters that split their weights; rewrites the edit log accordingly.

    Args:
        model: The rewritten model.
        record: Its edit log.
        adapter: Name of an adapter; all of them by default.

    Returns:
        How many were converted.

    Raises:
        ModelStateError: an original weight is gone, adapters are merged, or something else
            changed the weight too; nothing has changed then.
    """
    context = ApplyContext(0)
    found = [each for operation in record.operations for each in _splits(operation, adapter)]
    banks = [each.made.bank(model, each.edit, context) for each in found]
    for each, bank in zip(found, banks, strict=True):
        _check_alone(each, bank)
    originals: list[Tensor] = []
    for each in found:
        own = ApplyContext(0, each.operation.kept, shared=context.shared)
        originals.append(each.made.original(model, each.edit, own))
    for each, bank, original in zip(found, banks, originals, strict=True):
        bank.add_module(each.made.adapter, _plain(bank, each))
        each.made.put_original(model, each.edit, original, each.operation.kept)
        plain = dataclasses.replace(each.made, **_options(each.made))
        each.operation.edits[each.index] = plain.edited(each.edit)
    for each in found:
        for rule in each.operation.recipe["rules"]:
            if rule["id"] == each.edit.rule:
                rule["with"] = {**rule["with"], **_options(each.made)}
    return len(found)


def _splits(operation: Operation, adapter: str | None) -> list[_Split]:
    passes = passes_of(operation)
    found: list[_Split] = []
    for index, edit in enumerate(operation.edits):
        made = passes[edit.rule]
        if isinstance(made, LowRank) and made.splits and adapter in (None, made.adapter):
            found.append(_Split(operation, index, made))
    return found


def _check_alone(split: _Split, bank: Bank) -> None:
    """Raise if the weight is not what the adapter left of the original one."""
    if bank.merged is not None:
        raise ModelStateError(
            f"adapters are merged into the weight of {split.edit.site}",
            hint="call surgery.adapters.unmerge(model) first",
        )
    if any(links_of(method) for method in bank.adapters[split.made.adapter].methods):
        raise ModelStateError(
            f"the factors of adapter {split.made.adapter!r} at {split.edit.site} are duals of a "
            "mirror map",
            hint="bake the map in first, with a rule of pass: freeze",
        )
    for name, other in bank.adapters.items():
        if has_folded(other) or (name != split.made.adapter and other.beginning is not None):
            raise ModelStateError(
                f"adapter {name!r} changes the weight of {split.edit.site} too, so "
                f"{split.made.adapter!r} cannot be converted alone",
                hint="merge them, or put the adapters on different sites",
            )


def _options(made: LowRank) -> dict[str, Any]:
    """The options of a rule that would have made the converted adapters."""
    return {
        "method": "lora",
        "rank": 2 * made.rank,
        "alpha": 2 * made.rank * made.factor,
        "scaling": "standard",
        "options": {},
    }


def _plain(bank: Bank, split: _Split) -> nn.Module:
    """A LoRA, or one for each slice, with the factors ``[A; -A₀]`` and ``[B, B₀]``."""
    adapter = bank.adapters[split.made.adapter]
    if not isinstance(adapter, Sliced):
        return _lora(adapter.methods[0], bank)
    parts = {
        name: (ranges, _lora(method, bank)) for name, (ranges, method) in adapter.parts.items()
    }
    return Sliced(parts, adapter.rows).train(adapter.training)


@torch.no_grad()
def _lora(method: Method, bank: Bank) -> LoRA:
    A, B = method.plain()
    matrix = dataclasses.replace(bank.matrix, rows=B.shape[-2])
    made = LoRA(
        matrix,
        rank=A.shape[-2],
        scaling=method.scaling,
        dropout=method.dropout,
        device=A.device,
        dtype=A.dtype,
    ).train(method.training)
    made.lora_A.copy_(A)
    made.lora_B.copy_(B)
    made.requires_grad_(method.lora_A.requires_grad)
    return made
