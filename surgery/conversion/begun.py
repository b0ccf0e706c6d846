"""What rules insert, given its values next to one or a few stock tensors at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.inventory import Place, places
from surgery.checkpoints.placing import like
from surgery.conversion.jobs import Job, Whole
from surgery.conversion.layout import OutFile, Spot
from surgery.passes.base import ApplyContext, Pass, passes_of
from surgery.record import Edit, Operation

#: Name of a stock tensor → its values, in the model's dtype.
Read = Callable[[str], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Edits that are begun together.

    Attributes:
        edits: Index in the operation → edit, in the order in which they were applied.
        needs: First names of the stock tensors they read or change.
        keeps: Names of those of which a copy is kept.
    """

    edits: Mapping[int, Edit]
    needs: tuple[str, ...]
    keeps: tuple[str, ...]

    @property
    def adds(self) -> tuple[str, ...]:
        """Names of the tensors that they insert."""
        return tuple(name for edit in self.edits.values() for name in edit.adds)


class Beginnings:
    """The edits of one application to a model on the meta device.

    Args:
        model: The rewritten model.
        operation: The application; its edits are replaced by those that were begun.
        first: Further name of a tied tensor → its first.
        read: Reads a stock tensor.
    """

    def __init__(
        self, model: nn.Module, operation: Operation, first: Mapping[str, str], read: Read
    ) -> None:
        self._model = model
        self._operation = operation
        self._first = first
        self._read = read
        self._passes = passes_of(operation)
        self._context = ApplyContext(int(operation.recipe["seed"]))
        self._context.module(model, "")  # finds every module, before there are threads
        self._places = dict(places(model))
        self.groups = self._grouped()
        self._group_of: dict[OutFile, list[Group]] = {}

    def at_once(self) -> None:
        """Begin the edits that need no stock tensor and may depend on one another."""
        for index, edit in enumerate(self._operation.edits):
            if not self._is_apart(edit):
                self._materialise(edit.adds)
                self._operation.edits[index] = self._pass(edit).begin(
                    self._model, edit, self._context
                )

    def job(self, group: Group, spots: Mapping[str, Spot]) -> Job:
        """The job that begins a group and writes what came of it.

        Args:
            group: The edits.
            spots: Where its tensors go: what is added and what is needed by name, copies by
                ``kept_key`` of theirs.
        """
        for spot in spots.values():
            self._group_of.setdefault(spot.file, []).append(group)
        return Whole(lambda: self._make(group), spots, heavy=bool(group.needs))

    def notes(self, file: OutFile) -> dict[str, Any]:
        """What must be known of the groups of a finished file when they are not begun again."""
        found: dict[str, Any] = {}
        for group in self._group_of.get(file, ()):
            for index in group.edits:
                edit = self._operation.edits[index]
                state = self._pass(edit).state(self._model, edit, self._context)
                found[str(index)] = {"notes": list(edit.notes), "state": state}
        return found

    def resume(self, notes: Mapping[str, Any]) -> None:
        """Take over what ``notes`` said of edits that were begun before."""
        for index, told in notes.items():
            edit = self._operation.edits[int(index)]
            edit = dataclasses.replace(edit, notes=tuple(told["notes"]))
            self._operation.edits[int(index)] = edit
            if told["state"] is not None:
                self._pass(edit).resume(self._model, edit, told["state"], self._context)

    def _grouped(self) -> list[Group]:
        """Edits that share a stock tensor belong together."""
        groups: list[tuple[set[str], dict[int, Edit]]] = []
        for index, edit in enumerate(self._operation.edits):
            if not self._is_apart(edit):
                continue
            needs = {self._first.get(name, name) for name in self._pass(edit).needs(edit)}
            mine: dict[int, Edit] = {index: edit}
            for other in [each for each in groups if not each[0].isdisjoint(needs)]:
                groups.remove(other)
                needs |= other[0]
                mine |= other[1]
            groups.append((needs, dict(sorted(mine.items()))))
        return [
            Group(edits, tuple(sorted(needs)), self._keeps(edits.values()))
            for needs, edits in groups
        ]

    def _keeps(self, edits: Iterable[Edit]) -> tuple[str, ...]:
        kept = {n: None for edit in edits for n in self._pass(edit).keeps(edit)}
        return tuple(kept)

    def _is_apart(self, edit: Edit) -> bool:
        made = self._pass(edit)
        return made.separable or bool(made.needs(edit))

    def _pass(self, edit: Edit) -> Pass:
        return self._passes[edit.rule]

    def _materialise(self, names: Iterable[str]) -> None:
        for name in names:
            place = self._places[name]
            place.put(like(place.tensor, torch.empty_like(place.tensor, device="cpu")))

    def _make(self, group: Group) -> dict[str, Tensor]:
        """Begin a group; nothing of it stays in memory but what is given back."""
        borrowed = [*self._at(group.needs), *(self._places[name] for name in group.adds)]
        before = [place.tensor for place in borrowed]
        try:
            for name in group.needs:
                self._lend(name)
            self._materialise(group.adds)
            for index, edit in group.edits.items():
                begun = self._pass(edit).begin(self._model, edit, self._context)
                self._operation.edits[index] = begun
            made = {n: self._places[n].tensor for n in (*group.needs, *group.adds)}
            kept = {kept_key(name): self._context.kept.pop(name) for name in group.keeps}
            return made | kept
        finally:
            for place, tensor in zip(borrowed, before, strict=True):
                place.put(tensor)

    def _at(self, names: Iterable[str]) -> list[Place]:
        """Every place of some tensors, those of further names included."""
        wanted = {id(self._places[name].tensor) for name in names}
        return [place for place in self._places.values() if id(place.tensor) in wanted]

    def _lend(self, name: str) -> None:
        shared = self._at([name])
        value = like(shared[0].tensor, self._read(name))
        for place in shared:
            place.put(value)


def kept_key(name: str) -> str:
    """What the copy of a stock tensor is called in a saved folder."""
    return f"0/{name}"
