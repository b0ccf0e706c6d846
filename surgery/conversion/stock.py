"""The stock tensors of a model, from the checkpoint to where they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from surgery.checkpoints.names import KeyMap
from surgery.checkpoints.sharded import Checkpoint, Located
from surgery.conversion.changes import Merge
from surgery.conversion.jobs import Change, Copy, Job, Rows, Whole
from surgery.conversion.layout import Spot, contiguous_block
from surgery.conversion.quantised import Quantised
from surgery.errors import CheckpointError
from surgery.sources.links import Link

_PIECE = 1 << 26


@dataclass(frozen=True)
class Changes:
    """What happens to stock tensors before anything else does.

    Attributes:
        merges: Name of a weight → what is added into it.
        replaced: Name of a tensor → the trained one that takes its place.
    """

    merges: Mapping[str, Merge] = field(default_factory=dict[str, Merge])
    replaced: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, eq=False)
class Stock:
    """Stock tensors by name or by key.

    Attributes:
        checkpoint: Where they are read.
        names: The key map of the model and the checkpoint.
        changes: What happens to them.
        quantised: Which modules of the checkpoint are quantised.
        like: First name of each stock tensor → its dtype and shape in the model.
    """

    checkpoint: Checkpoint
    names: KeyMap
    like: Mapping[str, Tensor]
    changes: Changes
    quantised: Quantised

    @cached_property
    def _links(self) -> dict[str, Link]:
        """First name of each tensor → the link that fills it."""
        found: dict[str, Link] = {}
        for link in self.names.links:
            for name in link.names:
                found.setdefault(self.names.first(name), link)
        return found

    def check(self) -> None:
        """Raise unless everything can be read and changed as asked.

        Raises:
            CheckpointError: the names do not fit; two names of one tensor have other values; an
                adapter is to be merged into something that is quantised or made of several.
        """
        if self.quantised:
            self.quantised.check(self.names)
        else:
            self.names.check()
        self._check_kinds()
        self._check_twins()
        for name in (*self.changes.merges, *self.changes.replaced):
            self._check_open(name)

    def by_name(self, name: str, like: Tensor, spot: Spot) -> list[Job]:
        """Jobs that write one tensor of the model.

        Args:
            name: Its first name.
            like: Its dtype and shape.
            spot: Where it goes.
        """
        replaced = self.changes.replaced.get(name)
        if replaced is not None:
            return [_held(replaced.to(like.dtype), spot)]
        link = self._links[name]
        merge = self.changes.merges.get(name)
        blocks = self._blocks(link, tuple(like.shape))
        if blocks is None or (merge is not None and not merge.by_rows):
            return [Whole(lambda: {name: self.whole(name, like.dtype)}, {name: spot}, heavy=True)]
        width = like.dtype.itemsize
        return [
            _job(located, Spot(spot.file, spot.start + at * width), like.dtype, merge, at)
            for located, at in blocks
        ]

    def by_key(self, key: str, dtype: torch.dtype, spot: Spot) -> Job:
        """The job that writes one tensor of the checkpoint under its own key.

        Args:
            key: Its key.
            dtype: What it is cast to.
            spot: Where it goes.
        """
        located = self.checkpoint.tensors[key]
        link = self.names.by_key.get(key)
        name = None if link is None else self.names.first(link.names[0])
        if link is None or name is None:
            return _job(located, spot, dtype, None, 0)
        if link.operation and key in link.parts:
            name = self.names.first(link.parts[key].name)
        replaced = self.changes.replaced.get(name)
        if replaced is not None:
            return _held(replaced.to(dtype), spot)
        merge = self.changes.merges.get(name)
        if merge is None:
            return _job(located, spot, dtype, None, 0)
        if not merge.by_rows:
            return Whole(
                lambda: {key: merge.whole(self.checkpoint.read(key)).to(dtype)},
                {key: spot},
                heavy=True,
            )
        # Zero for a whole weight; what has no place in one was refused by check_by_key.
        at = _block_of(link, key, merge) or 0
        return _job(located, spot, dtype, merge, at)

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A stock tensor in memory, with what is added into it.

        Args:
            name: Its first name.
            dtype: What it is cast to.
        """
        replaced = self.changes.replaced.get(name)
        if replaced is not None:
            return replaced.to(dtype, copy=True)
        merge = self.changes.merges.get(name)
        stored = self.stored(name)
        return (stored if merge is None else merge.whole(stored)).to(dtype).contiguous()

    def stored(self, name: str) -> Tensor:
        """A stock tensor in memory, as the checkpoint has it.

        Args:
            name: Its first name.
        """
        link = self._links[name]
        made = link.load({key: self.checkpoint.read(key) for key in link.keys})
        return next(t for each, t in made.items() if self.names.first(each) == name)

    def _blocks(self, link: Link, shape: tuple[int, ...]) -> list[tuple[Located, int]] | None:
        """The stored tensors that a tensor consists of, each with its first element in it.

        Returns:
            None if it does not consist of some, one after the other.
        """
        if not link.operation:
            return [(self.checkpoint.tensors[link.keys[0]], 0)]
        if set(link.parts) != set(link.keys) or len(link.names) != 1:
            return None
        found: list[tuple[Located, int]] = []
        for key, part in link.parts.items():
            at = contiguous_block(shape, part.index)
            if at is None:
                return None
            found.append((self.checkpoint.tensors[key], at))
        return found

    def _check_open(self, name: str) -> None:
        """Raise unless the values of a weight can be changed in the checkpoint's own layout."""
        link = self._links.get(name)
        keys = (name,) if link is None else link.keys
        for key in keys:
            how = self.quantised.format_of(key)
            if how is not None or link is None:
                raise CheckpointError(
                    f"{key} is quantised ({how or 'packed'}), and what is merged into it would be "
                    "rounded away",
                    hint="merge into the unquantised checkpoint and quantise that, or keep the "
                    "adapter apart",
                )

    def check_by_key(self) -> None:
        """Raise unless what is changed can be written under the checkpoint's own keys.

        Raises:
            CheckpointError: the library makes the weight of several tensors in a way that does
                not let a sum be taken apart again.
        """
        for name, merge in self.changes.merges.items():
            link = self._links[name]
            if not link.operation:
                continue
            blocks = [_block_of(link, key, merge) for key in link.keys]
            if not merge.by_rows or None in blocks:
                raise CheckpointError(
                    f"{name} is made of {link.keys[0]} and {len(link.keys) - 1} more "
                    f"({link.operation}), and what is merged into it cannot be written back there",
                    hint="load the model, merge, and export it with format='merged'",
                )
        for name in self.changes.replaced:
            if self._links[name].operation:
                raise CheckpointError(
                    f"{name} was trained whole, and {self.names.label} holds it in parts",
                    hint="load the model, merge, and export it with format='merged'",
                )

    def _check_kinds(self) -> None:
        """Raise if integers are stored for a weight: they are not its values."""
        for link in self.names.links:
            name = self.names.first(link.names[0])
            for key in link.keys:
                stored = self.checkpoint.tensors[key].slot.dtype
                alike = stored.is_floating_point == self.like[name].is_floating_point()
                if not alike and self.quantised.format_of(key) is None:
                    raise CheckpointError(
                        f"{self.names.label} holds {key} as {stored}, the model's {name} is "
                        f"{self.like[name].dtype}",
                        hint="a quantised checkpoint says so in its config.json "
                        "(quantization_config)",
                    )

    def _check_twins(self) -> None:
        """Raise if two keys of one tensor hold different values."""
        for link in self.names.links:
            first = self.names.first(link.names[0])
            other = self._links[first]
            if link is other or link.operation or other.operation:
                continue
            if not self._same(link.keys[0], other.keys[0]):
                raise CheckpointError(
                    f"{self.names.label} holds different values for {other.keys[0]} and "
                    f"{link.keys[0]}, which are one tensor in the model",
                    hint="set tie_word_embeddings to false in config.json, or remove one of them",
                )

    def _same(self, one: str, other: str) -> bool:
        first, second = (self.checkpoint.tensors[key].slot for key in (one, other))
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        rows = first.shape[0] if first.shape else 0
        step = max(1, _PIECE // max(first.nbytes // max(rows, 1), 1))
        if not rows:
            return torch.equal(self.checkpoint.read(one), self.checkpoint.read(other))
        read = self.checkpoint.read_rows
        return all(
            torch.equal(read(one, at, min(at + step, rows)), read(other, at, min(at + step, rows)))
            for at in range(0, rows, step)
        )


def _block_of(link: Link, key: str, merge: Merge) -> int | None:
    """The first element of a weight that a key holds; None if it holds no block of it."""
    if not link.operation:
        return 0
    part = link.parts.get(key)
    return None if part is None else contiguous_block(merge.matrix.shape, part.index)


def _job(
    located: Located, spot: Spot, dtype: torch.dtype, merge: Merge | None, first_element: int
) -> Job:
    """Copy, cast, or add to one stored tensor, which begins at some element of a weight."""
    slot = located.slot
    if merge is None:
        if slot.dtype == dtype:
            return Copy(located.file, slot.start, slot.end, spot)
        return Rows(located, spot, dtype, columns=1)
    return Rows(
        located, spot, dtype, merge.columns, _counted_on(merge, first_element // merge.columns)
    )


def _counted_on(merge: Merge, first: int) -> Change:
    return lambda rows, row, room: merge.rows(rows, first + row, room)


def _held(tensor: Tensor, spot: Spot) -> Job:
    return Whole(lambda: {"": tensor}, {"": spot})
