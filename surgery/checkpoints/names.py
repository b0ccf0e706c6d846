"""``surgery.keymap``: under which name each tensor goes, before and after a rewrite and on disk.

A tensor has up to three names: its key in the checkpoint that its library publishes, its name in
the stock model, and its name in the rewritten one. A rewrite keeps stock tensors under their names
and adds its own beside them; libraries rename, stack and split tensors between the file and the
model. Saving, restoring, loading, converting and undoing look names up here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.checkpoints.inventory import Inventory, places, take
from surgery.checkpoints.sharded import Checkpoint, open_checkpoint
from surgery.errors import CheckpointError
from surgery.record import Record, added_names, record_of
from surgery.sources.links import Link, linked, published
from surgery.table import render, some

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")
#: A checkpoint: its folder, the opened folder, or its tensors by key.
Published = Checkpoint | Mapping[str, Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class Entry:
    """One name of one tensor of a model.

    Attributes:
        name: The name in the model as it is now.
        stock: The name in the stock model; None for what a rewrite added.
        rule: Id of the rule that added it; None for a stock tensor.
        tied_to: The first name of the same tensor, where this is a further one.
        persistent: Whether state dicts hold it.
        keys: The published keys that it is made of; empty for what no checkpoint holds.
    """

    name: str
    stock: str | None
    rule: str | None
    tied_to: str | None
    persistent: bool
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mismatch:
    """A stock tensor that the checkpoint has in another shape.

    Attributes:
        name: The stock tensor.
        keys: The keys it would be made of.
        found: The shape they give, or why they give none.
        expected: The shape in the model.
    """

    name: str
    keys: tuple[str, ...]
    found: str
    expected: tuple[int, ...]


@dataclass(frozen=True)
class KeyMap:
    """The names of a model's tensors. ``print(keymap)`` shows them as a table.

    Attributes:
        entries: Every name, in the order of the state dict.
        links: How published tensors become stock ones, one for each group that is converted
            together.
        unknown: Keys of the checkpoint that the model has no place for.
        ignored: Keys that the model's library leaves out on purpose.
        optional: Names that the model's library does not miss in a checkpoint.
        gone: Name of what rewrites took away again → id of the rule that did.
        mismatched: Stock tensors whose shape in the checkpoint is another.
        label: What the keys are those of, for messages.
    """

    entries: tuple[Entry, ...]
    links: tuple[Link, ...]
    unknown: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    gone: Mapping[str, str] = field(default_factory=dict[str, str])
    mismatched: tuple[Mismatch, ...] = ()
    label: str = "the published checkpoint"
    _expected: Callable[[], Mapping[str, tuple[str, ...]]] = field(default=dict, repr=False)

    @cached_property
    def by_name(self) -> Mapping[str, Entry]:
        """Name → entry."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def by_key(self) -> Mapping[str, Link]:
        """Published key → the link that reads it."""
        return {key: link for link in self.links for key in link.keys}

    @cached_property
    def new(self) -> Mapping[str, str]:
        """Name of everything that rewrites added → the rule that did."""
        return {entry.name: entry.rule for entry in self.entries if entry.rule is not None}

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Every further name of a tensor → its first."""
        found = {entry.name: entry.tied_to for entry in self.entries}
        return {name: first for name, first in found.items() if first is not None}

    @cached_property
    def transient(self) -> tuple[str, ...]:
        """Buffers that no state dict and no checkpoint holds."""
        return tuple(entry.name for entry in self.entries if not entry.persistent)

    @cached_property
    def stock(self) -> tuple[str, ...]:
        """Names of the stock tensors that a state dict holds, tied ones under each name."""
        return tuple(
            entry.name for entry in self.entries if entry.stock is not None and entry.persistent
        )

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Stock tensors that no key of the checkpoint leads to, by their first name."""
        filled = {self.first(name) for link in self.links for name in link.names}
        done = {*self.tied, *filled, *self.optional}
        return tuple(name for name in self.stock if name not in done)

    def first(self, name: str) -> str:
        """The name under which a tensor that has several is stored."""
        return self.tied.get(name, name)

    def to_stock(self, state: Mapping[str, T]) -> dict[str, T]:
        """What of a state dict of the model is stock, under the stock model's names.

        Raises:
            CheckpointError: a name is missing, or belongs to neither.
        """
        allowed = {*self.stock, *self.new}
        _check_names("the state dict", self.stock, allowed, state, tied=self.tied)
        return {name: state[name] for name in self.stock if name in state}

    def from_stock(self, state: Mapping[str, T]) -> dict[str, T]:
        """A state dict of the stock model under the names of this one.

        Raises:
            CheckpointError: a name is missing, or the stock model has no such tensor.
        """
        _check_names("the state dict", self.stock, set(self.stock), state, tied=self.tied)
        return dict(state)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stock tensors by name, from those of the checkpoint by key.

        Raises:
            CheckpointError: a key is missing, unknown, or does not have the shape it should.
        """
        known = {*self.by_key, *self.ignored}
        _check_names(self.label, self.by_key, known, tensors)
        return {n: t for link in self.links for n, t in link.load(tensors).items()}

    def publish(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the checkpoint by key, from the stock ones by name.

        Raises:
            CheckpointError: a name is missing.
        """
        names = [name for link in self.links for name in link.names]
        _check_names("the state dict", names, {*self.stock, *self.new}, tensors)
        return {k: t for link in self.links for k, t in link.publish(tensors).items()}

    def check(self, *, allow_missing: bool = False, allow_unexpected: bool = False) -> None:
        """Raise unless every stock tensor has its key and every key its tensor.

        Raises:
            CheckpointError: naming the first that do not.
        """
        problems: list[str] = []
        if self.missing and not allow_missing:
            problems.append(f"the model needs {some(self._missing_keys())}, which is not there")
        if self.mismatched:
            problems.append(self._mismatch(self.mismatched[0]))
        if self.unknown and not allow_unexpected:
            problems.append(f"the model has no place for {some(self.unknown)}")
        if problems:
            raise CheckpointError(
                f"{self.label} does not fit: {'; '.join(problems)}",
                hint="load the checkpoint of this architecture; allow_missing=True leaves what it "
                "lacks as it is, allow_unexpected=True what it has too much",
            )

    def view(self) -> Table:
        """As a table for a terminal, one row per kind of tensor."""
        from rich.table import Table
        from rich.text import Text

        table = Table("model", "stock model", "published", "rule")
        for entry in self.entries:
            keys = entry.keys[0] if entry.keys else "-"
            more = f" and {len(entry.keys) - 1} more" if len(entry.keys) > 1 else ""
            stock = entry.stock or "-"
            if entry.tied_to is not None:
                stock = f"{stock} (tied to {entry.tied_to})"
            cells = (entry.name, stock, keys + more, entry.rule or "-")
            table.add_row(*map(Text, cells))
        return table

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "entries": [
                {
                    "name": entry.name,
                    "stock": entry.stock,
                    "rule": entry.rule,
                    "tied_to": entry.tied_to,
                    "persistent": entry.persistent,
                    "keys": list(entry.keys),
                }
                for entry in self.entries
            ],
            "links": [
                {"keys": list(link.keys), "names": list(link.names), "operation": link.operation}
                for link in self.links
            ],
            "gone": dict(self.gone),
            "unknown": list(self.unknown),
            "ignored": list(self.ignored),
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        return render(self.view())

    def _missing_keys(self) -> list[str]:
        """What the checkpoint lacks, by the keys that the library would publish it under."""
        expected = self._expected()
        return [key for name in self.missing for key in expected.get(name, (name,))]

    def _mismatch(self, odd: Mismatch) -> str:
        more = f", and {len(self.mismatched) - 1} more differ" if len(self.mismatched) > 1 else ""
        expected = self._expected().get(odd.name, ())
        absent = [key for key in expected if key not in odd.keys]
        if absent and set(odd.keys).issubset(expected):
            return f"{odd.name} needs {some(absent)}, which is not there{more}"
        return (
            f"{odd.name} is made of {some(odd.keys)} as {odd.found}, the model's is "
            f"{odd.expected}{more}"
        )


def keymap(model: nn.Module, checkpoint: Published | None = None) -> KeyMap:
    """Relate the names of a model's tensors to those of its stock model and of a checkpoint.

    Reads no weight: shapes and names decide. The model may lie on the meta device.

    Args:
        model: A model with or without rewrites.
        checkpoint: The checkpoint whose keys are meant: a folder of safetensors, or tensors by
            key. By default the layout in which the model's library saves it.

    Raises:
        CheckpointError: the folder is no checkpoint; two of its keys lead to one tensor.
    """
    found = take(model)
    added = added_names(model)
    state = stock_state(found, added)

    def layout() -> dict[str, Tensor]:
        unique = {name: tensor for name, tensor in state.items() if name not in found.ties}
        return published(model, unique)

    def expected() -> dict[str, tuple[str, ...]]:
        return _keys_by_name(linked(model, state, layout()).links)

    keys = layout() if checkpoint is None else shapes_of(checkpoint)
    related = linked(model, state, keys)
    _check_links(related.links)
    return KeyMap(
        entries=tuple(_entries(found, added, _keys_by_name(related.links))),
        links=related.links,
        unknown=related.unknown,
        ignored=related.ignored,
        optional=related.optional,
        gone=_gone(model, {name for name, _ in places(model)}),
        mismatched=() if checkpoint is None else tuple(_mismatched(related.links, state, keys)),
        label=label_of(checkpoint),
        _expected=expected,
    )


def _keys_by_name(links: Iterable[Link]) -> dict[str, tuple[str, ...]]:
    return {name: link.keys for link in links for name in link.names}


def _gone(model: nn.Module, present: set[str]) -> dict[str, str]:
    edits = (record_of(model) or Record()).edits
    return {n: edit.rule for edit in edits for n in edit.removes if n not in present}


def _mismatched(
    links: Iterable[Link], state: Mapping[str, Tensor], keys: Mapping[str, Tensor]
) -> Iterable[Mismatch]:
    for link in links:
        try:
            made = link.load(keys)
        except CheckpointError as error:
            name = link.names[0]
            yield Mismatch(name, link.keys, error.message, tuple(state[name].shape))
            continue
        for name, tensor in made.items():
            if tensor.shape != state[name].shape:
                found, expected = tuple(tensor.shape), tuple(state[name].shape)
                yield Mismatch(name, link.keys, str(found), expected)


def stock_state(found: Inventory, added: Mapping[str, str]) -> dict[str, Tensor]:
    """The persistent tensors that are stock, under every name they have."""
    state = {name: tensor for name, tensor in found.state.items() if name not in added}
    for alias, name in found.ties.items():
        if name in state and alias not in added:
            state[alias] = state[name]
    return state


def shapes_of(checkpoint: Published) -> dict[str, Tensor]:
    """Key → tensor on the meta device, of everything a checkpoint holds."""
    if isinstance(checkpoint, Mapping):
        return {key: _empty(tensor.shape, tensor.dtype) for key, tensor in checkpoint.items()}
    opened = opened_checkpoint(checkpoint)
    return {
        key: _empty(located.slot.shape, located.slot.dtype)
        for key, located in opened.tensors.items()
    }


def opened_checkpoint(checkpoint: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    """A folder, opened unless it is already."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(Path(checkpoint))


def label_of(checkpoint: Published | None) -> str:
    """What a checkpoint is called in messages."""
    if checkpoint is None:
        return "the published checkpoint"
    if isinstance(checkpoint, Checkpoint):
        return str(checkpoint.folder)
    return "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)


def _entries(
    found: Inventory, added: Mapping[str, str], keys: Mapping[str, tuple[str, ...]]
) -> Iterable[Entry]:
    stored = {**found.state, **found.transient}
    for name in (*found.state, *found.ties, *found.transient):
        first = found.ties.get(name, name)
        rule = added.get(name, added.get(first))
        persistent = first in found.state
        yield Entry(
            name=name,
            stock=None if rule is not None else name,
            rule=rule,
            tied_to=None if name in stored else first,
            persistent=persistent,
            keys=keys.get(name) or keys.get(first) or (),
        )


def _check_links(links: Iterable[Link]) -> None:
    for link in links:
        if not link.operation and len(link.keys) > 1:
            raise CheckpointError(
                f"{link.keys[0]} and {link.keys[1]} are both {link.names[0]} of the model",
                hint="remove the one that is out of date",
            )


def _check_names(
    label: str,
    needed: Iterable[str],
    allowed: Iterable[str],
    given: Mapping[str, Any],
    *,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Raise unless all of ``needed`` is given, tied tensors once, and nothing but ``allowed``."""
    ties = tied or {}
    held = {ties.get(name, name) for name in given}
    missing = [name for name in needed if name not in given and ties.get(name, name) not in held]
    permitted = set(allowed)
    extra = [name for name in given if name not in permitted]
    parts = [f"it lacks {some(missing)}"] if missing else []
    if extra:
        parts.append(f"the model has no {some(extra)}")
    if parts:
        raise CheckpointError(
            f"{label} does not fit: {'; '.join(parts)}",
            hint="pass the tensors of a model built with the same configuration",
        )


def _empty(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
