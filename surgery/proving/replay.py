"""What a recipe makes of a stock weight, computed again from its edit log and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.checkpoints.inventory import places
from surgery.checkpoints.placing import like
from surgery.conversion.merges import changes_of
from surgery.conversion.stock import Changes
from surgery.editing import repeat
from surgery.interchange.folder import PREFIX
from surgery.interchange.layers import layers_of, the_adapter
from surgery.interchange.writing import in_peft
from surgery.passes.base import ApplyContext, passes_of
from surgery.passes.hosts.merging import merge_into
from surgery.passes.lowrank import LowRank
from surgery.passes.payload import places_of
from surgery.proving.proof import Verdict
from surgery.proving.sides import Tensors
from surgery.record import Edit, Record
from surgery.sources import rebuild
from surgery.tree import joined

#: What a weight may have become: how, by which rule, and the values.
Candidate = tuple[Verdict, str, Tensor]


class Replay:
    """The edits of one side, repeated on the meta device, where one weight at a time gets values.

    Args:
        description: How the stock model is rebuilt.
        record: The edit log.
        tensors: Where the tensors lie that the edits added.
        adapter: Which adapter is merged; by default those that the log says are active.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        record: Record,
        tensors: Tensors,
        adapter: str | None = None,
    ) -> None:
        self._description = description
        self._record = record
        self._tensors = tensors
        self._adapter = adapter

    def consumed(self, name: str) -> set[str]:
        """Names of what the edits beside a weight added, which a merge makes superfluous."""
        return {added for _, edit, _ in self._edits(name) for added in edit.adds}

    @torch.no_grad()
    def candidates(self, name: str, weight: Tensor, *, settled: bool) -> Iterator[Candidate]:
        """What the edits beside a weight make of it, step by step.

        Args:
            name: The weight.
            weight: Its values before the edits; with ``settled`` after they were applied, and
                before anything was merged.
            settled: Which of both.
        """
        edits = list(self._edits(name))
        if not edits:
            return
        place = places_of(edits[0][1])[0]
        where = self._where[joined(place.path, place.parameter)]
        before = where.tensor
        where.put(like(before, weight.clone()))
        rules = ", ".join(dict.fromkeys(edit.rule for _, edit, _ in edits))
        try:
            for made, edit, context in edits:
                self._fill(edit)
                bank = made.bank(self._model, edit, context)
                merged, bank.merged = bank.merged, None
                if not settled:
                    made.settle(self._model, edit, context)
                bank.merged = merged
            yield "changed", f"by rule {rules}", where.tensor.detach().clone()
            bank = edits[0][0].bank(self._model, edits[0][1], edits[0][2])
            mix = bank.merged or bank.active
            if self._adapter is not None:
                mix = ((self._adapter, 1.0),)
            parameter = cast("nn.Parameter", where.tensor)
            merged = bank.merged
            merge_into(parameter, bank, mix)
            bank.merged = merged
            yield "merged", f"by rule {rules}", parameter.detach().clone()
        finally:
            where.put(before)

    @cached_property
    def in_peft(self) -> Mapping[str, Tensor]:
        """The adapter under PEFT's keys, as an export to it converts it.

        Raises:
            ExportError: PEFT has no layer that computes the same.
        """
        for edit in self._record.edits:
            self._fill(edit)
        layers = layers_of(self._model, *the_adapter(self._model, self._adapter))
        found = in_peft(self._model, layers, trained=False).tensors
        # What is still on the meta device is of the stock model, and not the adapter's.
        return {PREFIX + key: tensor for key, tensor in found.items() if not tensor.is_meta}

    def _edits(self, name: str) -> Iterator[tuple[LowRank, Edit, ApplyContext]]:
        for operation in self._record.operations:
            passes = passes_of(operation)
            for edit in operation.edits:
                made = passes[edit.rule]
                if isinstance(made, LowRank) and name in self._names(edit):
                    yield made, edit, ApplyContext(int(operation.recipe["seed"]))

    def _names(self, edit: Edit) -> set[str]:
        """Every name of the weight that an edit is beside."""
        own = {joined(place.path, place.parameter) for place in places_of(edit)}
        ties = self._tensors.ties
        return own | {ties[name] for name in own if name in ties}

    def _fill(self, edit: Edit) -> None:
        for name in edit.adds:
            read = self._tensors.stock.get(name)
            if read is not None:
                self._where[name].put(like(self._where[name].tensor, read()))

    @cached_property
    def _model(self) -> nn.Module:
        model = rebuild(self._description, device="meta")
        repeat(model, self._record, values_follow=True)
        return model

    @cached_property
    def _where(self) -> dict[str, Any]:
        return dict(places(self._model))


class Adapter:
    """An adapter from a folder of its own, as ``surgery.convert --adapter`` merges it.

    Args:
        description: How the stock model is rebuilt.
        folder: The adapter.
        source: The stock tensors.
    """

    def __init__(self, description: Mapping[str, Any], folder: Path, source: Tensors) -> None:
        self._description = description
        self._folder = folder
        self._source = source

    @torch.no_grad()
    def candidates(self, name: str, weight: Tensor) -> Iterator[Candidate]:
        """What the adapter makes of a weight, in float32 at least."""
        merge = self._changes.merges.get(name)
        if merge is not None:
            yield "merged", f"with {self._folder}", merge.whole(weight)
        if name in self._changes.replaced:
            yield "changed", f"trained in {self._folder}", self._changes.replaced[name]

    @cached_property
    def _changes(self) -> Changes:
        model = rebuild(self._description, device="meta")
        read = self._source.stock
        return changes_of(model, self._folder, lambda name: read[name](), allow_other_base=True)
