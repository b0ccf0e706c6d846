"""Low-rank adapters beside weights, in plain operations: what generated files contain.

Nothing here is imported by an export; the text of what it needs is copied into it. It computes
what ``surgery.passes.hosts`` computes, without switching adapters per call and without merging.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from architectures.adapters import Adapter, Matrix
from surgery.passes.hosts.bank import Mix, contributions
from surgery.passes.hosts.conv import is_cheaper_folded, with_convolutions
from surgery.passes.hosts.embedding import with_lookups
from surgery.passes.hosts.linear import with_branches

_Layer = nn.Module if TYPE_CHECKING else object
_Conv = nn.Conv2d if TYPE_CHECKING else object

#: The changed weights that the forwards which now run have formed, so that each is formed once.
_formed: ContextVar[dict[Any, Tensor] | None] = ContextVar("formed_weights", default=None)


class Bank(nn.Module):
    """The adapters of one weight, by name, beside the layer that has it. It is never called.

    Args:
        matrix: How the weight is read as a matrix.
        parameter: Its name in the layer.
        adapters: Name → adapter.
        active: Names of the adapters that count, each with its share. May be changed.
    """

    def __init__(
        self, matrix: Matrix, parameter: str, adapters: Mapping[str, Adapter], active: Mix
    ) -> None:
        super().__init__()
        self.matrix = matrix
        self.parameter = parameter
        self.active = active
        for name, adapter in adapters.items():
            self.add_module(name, adapter)

    def counting(self) -> list[tuple[Adapter, float]]:
        """The adapters that count, each with its share."""
        return contributions(cast("dict[str, Adapter]", self._modules), self.active)

    def changed(self, weight: Tensor) -> Tensor:
        """The weight with what its adapters add, formed in the wider dtype, in its own."""
        if any(each.is_meta for each in (weight, *self.parameters())):
            return weight  # loaders look at weights of which others have no values yet
        folded = changed = self.matrix.fold(weight)
        with torch.autocast(weight.device.type, enabled=False):
            for adapter, share in self.counting():
                changed = torch.add(changed, adapter.change(folded), alpha=share)
        return self.matrix.unfold(changed.to(weight.dtype))


class Banks(nn.Module):
    """The banks of several weights of one module, by the weight's name."""


def attach(module: nn.Module, bank: nn.Module, parameter: str = "") -> None:
    """Put adapters beside a layer, as its ``lowrank``.

    Args:
        module: The layer, whose class must be one that reads them.
        bank: The adapters.
        parameter: Of a module with several weights, the name of the one they belong to.
    """
    if not parameter:
        module.add_module("lowrank", bank)
        return
    if "lowrank" not in dict(module.named_children()):
        module.add_module("lowrank", Banks())
    module.get_submodule("lowrank").add_module(parameter, bank)


def bank_of(module: nn.Module, parameter: str = "weight") -> Any:
    """The adapters of a weight, or None."""
    found = module.__dict__["_modules"].get("lowrank")
    if isinstance(found, Banks):
        found = found.__dict__["_modules"].get(parameter)
    return found if found is not None and found.parameter == parameter else None


def train_adapters(model: nn.Module, others: Collection[str] = ()) -> None:
    """Let only the adapters be trained, and other parameters that are named."""
    banks = [each for each in model.modules() if isinstance(each, Bank)]
    adapters = {id(parameter) for bank in banks for parameter in bank.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in adapters or name in others)


class AdaptedLinear(nn.Linear):
    """An ``nn.Linear`` with low-rank adapters beside its weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """Maps x (..., in) to (..., out)."""
        output, bank = nn.Linear.forward(self, input), bank_of(self)
        return with_branches(self, bank, bank.counting(), input, output)


class AdaptedEmbedding(nn.Embedding):
    """An ``nn.Embedding`` with low-rank adapters beside its weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name for it
        """Indices (...) to embeddings (..., dim)."""
        output = nn.Embedding.forward(self, input)
        return with_lookups(self, bank_of(self).counting(), input, output)


class _AdaptedConv(_Conv):
    """A convolution with low-rank adapters beside its weight, of any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Maps x (batch, in, *positions) to (batch, out, *positions); the batch may be missing."""
        bank = bank_of(self)
        counting = bank.counting()
        if is_cheaper_folded(self, counting):
            return self._conv_forward(input, bank.changed(self.weight), self.bias)
        return with_convolutions(self, bank, counting, input, super().forward(input))


class AdaptedConv1d(_AdaptedConv, nn.Conv1d):
    """An ``nn.Conv1d`` with low-rank adapters beside its weight."""


class AdaptedConv2d(_AdaptedConv, nn.Conv2d):
    """An ``nn.Conv2d`` with low-rank adapters beside its weight."""


class AdaptedConv3d(_AdaptedConv, nn.Conv3d):
    """An ``nn.Conv3d`` with low-rank adapters beside its weight."""


class AdaptedOutput(_Layer):
    """Put before a layer that computes ``W x + b`` in a way of its own."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        """Maps x (..., in) to (..., out)."""
        output, bank = super().forward(input, *args, **kwargs), bank_of(self)
        return with_branches(self, bank, bank.counting(), input, output)


class AdaptedWeight(_Layer):
    """Put before a module whose weights are read by their names: it then reads changed ones."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock forward gives for the changed weights."""
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        token = _formed.set({})
        try:
            return super().forward(*args, **kwargs)
        finally:
            _formed.reset(token)

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        bank = bank_of(self, name) if name in self.__dict__["_parameters"] else None
        if bank is None:
            return value
        formed = None if torch.compiler.is_compiling() else _formed.get()
        if formed is None:
            return bank.changed(value)
        key = (id(self), name, torch.is_grad_enabled())
        if key not in formed:
            formed[key] = bank.changed(value)
        return formed[key]
