"""Work with adapters that ``lowrank`` put into a model: choose, mix, switch off, merge.

    adapters.names(model)                              # ("default", "french")
    adapters.activate(model, "french")                 # from now on
    with adapters.using(model, {"default": 0.7, "french": 0.3}):
        model(x)                                       # in this thread, in this block
    with adapters.disabled(model):
        model(x)                                       # the model without adapters
    adapters.merge(model)                              # into the weights
    adapters.unmerge(model)                            # and out of them

An adapter's share multiplies its change of the weights: ``{"a": 0.7, "b": 0.3}`` computes with
``W + 0.7 · ΔW_a + 0.3 · ΔW_b``. Layers that lack an adapter of a mix leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from architectures.adapters import Method
from surgery.errors import ModelStateError
from surgery.passes.base import in_force
from surgery.passes.conversion import to_plain
from surgery.passes.groups import parameter_groups
from surgery.passes.hosts import (
    BEFORE_MERGE,
    CHILD,
    Bank,
    Banks,
    Mix,
    Override,
    has_folded,
    merge_into,
    mergeable,
    overrides,
    take_out,
)
from surgery.passes.hosts import bank as hosts
from surgery.passes.lowrank import LowRank
from surgery.passes.stepping import prepare
from surgery.record import Operation, Record, rewritten
from surgery.registry import suggest
from surgery.tree import children, named_modules

__all__ = [
    "activate",
    "active",
    "disabled",
    "merge",
    "merged",
    "names",
    "parameter_groups",
    "parameters",
    "penalty",
    "prepare",
    "start",
    "to_lora",
    "unmerge",
    "using",
]

#: The name of an adapter, or names with their shares.
Choice = str | Mapping[str, float]


def names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters in a model, in the order they were added."""
    return tuple(dict.fromkeys(name for bank in _banks(model) for name in bank.adapters))


def parameters(model: nn.Module, name: str | None = None) -> Iterator[nn.Parameter]:
    """The tensors of the adapters, for an optimizer.

    Args:
        model: A rewritten model.
        name: One adapter; all of them by default.

    Raises:
        ModelStateError: there is no such adapter.
    """
    if name is not None:
        _mix(model, name)
    for bank in _banks(model):
        for each, adapter in bank.adapters.items():
            if name in (None, each):
                yield from adapter.parameters()


def active(model: nn.Module) -> dict[str, float]:
    """The adapters that count when nothing else is said, with their shares."""
    return {name: share for bank in _banks(model) for name, share in bank.active}


def activate(model: nn.Module, choice: Choice) -> None:
    """Choose the adapters that count from now on, in every thread.

    Which parameters require gradients stays as it is.

    Args:
        model: A rewritten model, or a part of one.
        choice: An adapter, or a mix of several; an empty mix means none.

    Raises:
        ModelStateError: there is no such adapter, or the adapters are merged.
    """
    mix = _mix(model, choice)
    banks = _banks(model)
    _refuse_merged(banks)
    _refuse_partial(banks, mix)
    for bank in banks:
        bank.active = _available(bank, mix)


@contextmanager
def using(model: nn.Module, choice: Choice) -> Generator[None]:
    """Choose the adapters that count for the calls made in a ``with`` block.

    Other threads and tasks are unaffected, and blocks nest. It reaches all of the rewritten model
    that ``model`` is or belongs to. With activation checkpointing the backward belongs into the
    block as well, since it runs the forward again; torch raises if it does not.

    Args:
        model: A rewritten model.
        choice: An adapter, or a mix of several; an empty mix means none.

    Raises:
        ModelStateError: there is no such adapter, or the adapters are merged.
    """
    override = Override.of(_mix(model, choice))
    banks = _banks(model)
    _refuse_merged(banks)
    _refuse_partial(banks, override.mix)
    chosen = dict.fromkeys((bank.family.number for bank in banks), override)
    token = overrides.set({**(overrides.get() or {}), **chosen})
    try:
        with _followed_by_compiled_code():
            yield
    finally:
        overrides.reset(token)


def _followed_by_compiled_code() -> AbstractContextManager[object]:
    """Run compiled models uncompiled where torch would not notice the context."""
    if hosts.COMPILER_SEES_CONTEXT:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def disabled(model: nn.Module) -> Generator[None]:
    """Switch all adapters off for the calls made in a ``with`` block; see ``using``.

    Raises:
        ModelStateError: the adapters are merged.
    """
    with using(model, {}):
        yield


def merged(model: nn.Module) -> dict[str, float]:
    """The adapters that are merged into the weights, with their shares."""
    return {name: share for bank in _banks(model) for name, share in bank.merged or ()}


def merge(
    model: nn.Module,
    choice: Choice | None = None,
    *,
    keep_base: Literal["memory", "none"] | None = None,
) -> None:
    """Add adapters into the weights, so that a forward costs what the stock model's does.

    The sum is formed in float32 at least and rounded once to the weight's dtype. With u its unit
    roundoff (2⁻²⁴ in float32), n the columns of a weight and r the rank, an output of a linear
    layer then differs from the unmerged one by at most
    ``2 (n + r + 4) u · (|W| |x| + |b| + s |B| |A| |x|)`` per element. Do not merge while a forward
    runs: its layers would disagree.

    Args:
        model: A rewritten model.
        choice: An adapter or a mix; what is active by default.
        keep_base: ``memory`` keeps a copy of every weight that is changed, for ``unmerge`` to put
            back bit for bit, and costs as much memory as those weights. ``none`` keeps nothing:
            ``unmerge`` subtracts, which leaves rounding errors, and ``undo`` refuses until then.
            The rule's ``keep_base`` by default.

    Raises:
        ModelStateError: there is no such adapter, something is merged already, the model is not
            the whole rewritten one, or a weight cannot be merged into (quantised, parametrised,
            without values). Nothing has changed then.
    """
    root, record = rewritten(model)
    carriers = _carriers(root)
    _refuse_merged(carrier.bank for carrier in carriers)
    wanted = None if choice is None else _mix(root, choice)
    if wanted is not None:
        _refuse_partial((carrier.bank for carrier in carriers), wanted)
    weights = [mergeable(each.module, each.parameter, each.path) for each in carriers]
    for carrier, weight in zip(carriers, weights, strict=True):
        bank = carrier.bank
        mix = _available(bank, bank.active if wanted is None else wanted)
        changes = bool(bank.contributions(mix))
        bank.copied = changes and (keep_base or bank.keep_base) == "memory"
        if bank.copied:
            kept = _operation(record, carrier).kept
            kept[_free_key(kept, carrier.name)] = weight.detach().clone()
        merge_into(weight, bank, mix)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the weights: bit for bit where a copy was kept.

    Without a copy the change is subtracted, which leaves the rounding errors of two sums.

    Args:
        model: A rewritten model whose adapters are merged.

    Raises:
        ModelStateError: nothing is merged, the model is not the whole rewritten one, or rows were
            scaled and no copy was kept: by zero, or by factors that were not saved.
    """
    root, record = rewritten(model)
    carriers = [carrier for carrier in _carriers(root) if carrier.bank.merged is not None]
    if not carriers:
        raise ModelStateError(
            "no adapter is merged", hint="surgery.adapters.merged(model) says what is"
        )
    for carrier in carriers:
        kept = _operation(record, carrier).kept
        weight = mergeable(carrier.module, carrier.parameter, carrier.path)
        key = carrier.name + BEFORE_MERGE
        copied = kept.pop(key if key in kept else carrier.name) if carrier.bank.copied else None
        take_out(weight, carrier.bank, copied)


def penalty(model: nn.Module) -> Tensor:
    """The terms that methods add to the loss, such as SORSA's; a scalar, zero if there are none.

    The adapters of one name and method count with their mean, as in the authors' code.

    Raises:
        ModelStateError: the model has no adapters.
    """
    terms: dict[tuple[str, type[Method]], list[Tensor]] = {}
    tensor = torch.zeros(())
    for bank in _banks(model):
        for name, adapter in bank.adapters.items():
            for method in adapter.methods:
                tensor = method.lora_A
                term = method.penalty()
                if term is not None:
                    terms.setdefault((name, type(method)), []).append(term)
    means = [
        torch.stack([each.to(tensor.device) for each in group]).mean() for group in terms.values()
    ]
    return torch.stack(means).sum() if means else torch.zeros((), device=tensor.device)


def start(model: nn.Module) -> None:
    """Give adapters that were put in on the meta device their first values.

    For a model that was rewritten on "meta" and whose weights have been loaded since; the values
    are those that applying the rules to the loaded model would have given.

    Raises:
        ModelStateError: no adapter waits for its values, or something is still on the meta device.
    """
    root, record = rewritten(model)
    waiting = 0
    for made, edit, context in in_force(record):
        if isinstance(made, LowRank) and made.adapter in made.bank(root, edit, context).pending:
            made.begin(root, edit, context)
            waiting += 1
    if not waiting:
        raise ModelStateError(
            "every adapter has its values already",
            hint="start is for models that were rewritten on the meta device",
        )


def to_lora(model: nn.Module, name: str | None = None) -> nn.Module:
    """Convert adapters that took their start out of the weight to plain LoRA, in place.

    PiSSA, OLoRA, SORSA and re-initialised adapters compute with ``W - s B₀ A₀ + s B A``. Afterwards
    the weights are the original ones, and each adapter is a LoRA of twice the rank with the factors
    ``[A; -A₀]`` and ``[B, B₀]``: what other tools can load beside the original model. The edit log
    says so too. Tensors of the adapters are new: build a new optimizer to train on.

    Args:
        model: The whole rewritten model.
        name: One adapter; all of them by default.

    Returns:
        The same object.

    Raises:
        ModelStateError: there is no such adapter or none to convert, one that added to the weight
            while it was trained (ScaLoRA), an original weight is gone (``keep_base: none``), or
            adapters are merged. Nothing has changed then.
    """
    root, record = rewritten(model)
    if name is not None:
        _mix(root, name)
    for bank in _banks(root):
        for each, adapter in bank.adapters.items():
            if name in (None, each) and has_folded(adapter):
                raise ModelStateError(
                    f"adapter {each!r} added to the weights while it was trained, and the sum of "
                    "what it added has no low rank",
                    hint="merge it, or export the model with format='merged'",
                )
    if not to_plain(root, record, name):
        raise ModelStateError(
            "no adapter took its start out of the weight, so all are plain already",
            hint="to_lora is for PiSSA, OLoRA, SORSA and re-initialised adapters",
        )
    return model


@dataclass(frozen=True)
class _Carrier:
    """The first module that holds an adapted weight, and the bank of that weight."""

    path: str
    module: nn.Module
    parameter: str
    bank: Bank

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


def _carriers(model: nn.Module) -> list[_Carrier]:
    """Every bank of a model once, in module order."""
    found: dict[int, _Carrier] = {}
    for path, module in named_modules(model, duplicates=False):
        child = children(module).get(CHILD)
        if isinstance(child, Bank):
            found.setdefault(id(child), _Carrier(path, module, child.parameter, child))
        elif isinstance(child, Banks):
            for bank in cast("dict[str, Bank]", children(child)).values():
                found.setdefault(id(bank), _Carrier(path, module, bank.parameter, bank))
    return list(found.values())


def _banks(model: nn.Module) -> list[Bank]:
    """Every bank of a model once.

    Raises:
        ModelStateError: there is none.
    """
    found = [
        module for _, module in named_modules(model, duplicates=False) if isinstance(module, Bank)
    ]
    if not found:
        raise ModelStateError(
            f"this {type(model).__name__} has no adapters",
            hint="put some in with a lowrank rule: surgery.apply(model, recipe)",
        )
    return found


def _mix(model: nn.Module, choice: Choice) -> Mix:
    """A choice with its shares, every name of which exists."""
    shares = {choice: 1.0} if isinstance(choice, str) else dict(choice)
    known = names(model)
    for name, share in shares.items():
        if name not in known:
            raise ModelStateError(f"there is no adapter {name!r}", hint=suggest(name, known))
        if not math.isfinite(share):
            raise ModelStateError(f"the share of adapter {name!r} is {share}, not a finite number")
    return tuple((name, float(share)) for name, share in shares.items())


def _available(bank: Bank, mix: Mix) -> Mix:
    return tuple(pair for pair in mix if pair[0] in bank.adapters)


def _refuse_merged(banks: Iterable[Bank]) -> None:
    if any(bank.merged is not None for bank in banks):
        raise ModelStateError(
            "adapters are merged into the weights",
            hint="call surgery.adapters.unmerge(model) first",
        )


def _refuse_partial(banks: Iterable[Bank], mix: Mix) -> None:
    shares = dict(mix)
    for bank in banks:
        for name, adapter in bank.adapters.items():
            if shares.get(name, 0.0) != 1.0 and has_folded(adapter):
                raise ModelStateError(
                    f"adapter {name!r} added to the weights while it was trained, so it cannot be "
                    f"switched off, exchanged or mixed with a share of {shares.get(name, 0.0):g}",
                    hint="for the model without it, call surgery.undo on a copy",
                )


def _free_key(kept: Mapping[str, Tensor], name: str) -> str:
    """Where the copy of a weight goes: a method that changed the weight has left one too."""
    return name + BEFORE_MERGE if name in kept else name


def _operation(record: Record, carrier: _Carrier) -> Operation:
    """The application that put the first adapter beside a weight."""
    return next(
        operation
        for operation in record.operations
        if any(carrier.name in edit.uses for edit in operation.edits)
    )
