"""Adding changes to a base weight for good, while it is trained around."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from architectures.adapters import Adapter, Method, Ranges
from surgery.errors import ModelStateError
from surgery.passes.hosts.bank import Bank
from surgery.passes.hosts.merging import mergeable


@dataclass(frozen=True, eq=False)
class Fold:
    """Adds a change to the base weight of an adapter, in place.

    Attributes:
        module: The module that holds the weight.
        path: Its path, for messages.
        bank: The adapters of the weight.
        adapter: Name of the adapter that folds.
        method: The adapter, or the part of it that belongs to a slice of the weight.
        ranges: The rows of the weight that the adapter belongs to; None for all.
        kept: Where the weight is copied to before it changes for the first time, under ``name``,
            for undo; None to keep no copy.
    """

    module: nn.Module
    path: str
    bank: Bank
    adapter: str
    method: Method
    ranges: Ranges | None = None
    kept: dict[str, Tensor] | None = None

    @property
    def name(self) -> str:
        """Full name of the weight."""
        return f"{self.path}.{self.bank.parameter}" if self.path else self.bank.parameter

    @property
    def weight(self) -> nn.Parameter:
        """The weight.

        Raises:
            ModelStateError: it is quantised, sharded, parametrised or without values.
        """
        return mergeable(self.module, self.bank.parameter, self.path)

    @torch.no_grad()
    def __call__(self, change: Tensor) -> Tensor:
        """Add a change to the weight, in the dtype of the change, rounding once.

        Args:
            change: ``(*stack, rows, columns)``, float32 or wider; the rows of the adapter's slice
                if it has one.

        Returns:
            What a weight narrower than the change could not take in of it.

        Raises:
            ModelStateError: the weight cannot take it in: it is merged, or the adapter counts with
                another share than 1.
        """
        self._check()
        weight = self.weight
        if self.kept is not None and self.name not in self.kept:
            self.kept[self.name] = weight.detach().clone()
        self.method.folded.fill_(1)
        matrix = self.bank.matrix
        if self.ranges is None and weight.dtype == change.dtype:
            weight.add_(matrix.unfold(change))
            return torch.zeros_like(change)
        folded = matrix.fold(weight)
        before = self._rows(folded).to(change.dtype)
        after = (before + change).to(weight.dtype)
        lost = change - (after.to(change.dtype) - before)
        if self.ranges is None:
            weight.copy_(matrix.unfold(after))
            return lost
        taken = 0
        whole = folded.clone()
        for start, stop in self.ranges:
            whole[start:stop] = after[taken : taken + stop - start]
            taken += stop - start
        weight.copy_(matrix.unfold(whole))
        return lost

    def _rows(self, folded: Tensor) -> Tensor:
        if self.ranges is None:
            return folded
        return torch.cat([folded[start:stop] for start, stop in self.ranges])

    def _check(self) -> None:
        if self.bank.merged is not None:
            raise ModelStateError(
                f"adapters are merged into {self.name}, so it cannot be trained around",
                hint="call surgery.adapters.unmerge(model) first",
            )
        share = dict(self.bank.active).get(self.adapter, 0.0)
        if share != 1.0:
            raise ModelStateError(
                f"adapter {self.adapter!r} counts {share:g} times at {self.name}; what it folds "
                "into the weight counts once",
                hint=f"train it with surgery.adapters.activate(model, {self.adapter!r})",
            )


def has_folded(adapter: Adapter) -> bool:
    """Whether training an adapter has changed the base weight beside it."""
    return any(
        method.folds_weight and not method.folded.is_meta and bool(method.folded)
        for method in adapter.methods
    )
