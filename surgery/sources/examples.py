"""Example inputs: what a model is called with when it is traced or verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.errors import SourceError


@dataclass(frozen=True)
class Example:
    """The arguments of one call ``model(*args, **kwargs)``.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def coerce(cls, value: object) -> Example:
        """An Example from a tensor, a tuple or list (args), a mapping (kwargs) or an Example.

        Raises:
            SourceError: ``value`` is none of these, or a mapping has a key that is no name.
        """
        if isinstance(value, Example):
            return value
        if isinstance(value, Tensor):
            return cls((value,))
        if isinstance(value, (tuple, list)):
            return cls(tuple(cast("tuple[Any, ...]", value)))
        if isinstance(value, Mapping):
            given = cast("Mapping[object, Any]", value)
            wrong = [key for key in given if not isinstance(key, str)]
            if wrong:
                raise SourceError(f"example: keyword names must be strings, got {wrong[0]!r}")
            return cls((), {str(key): item for key, item in given.items()})
        raise SourceError(
            f"example: got {type(value).__name__}, expected a tensor, a tuple of positional "
            "arguments, a dict of keyword arguments, or surgery.Example(args, kwargs)"
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """The same call with every tensor, however deeply nested, replaced by ``change`` of it."""
        return Example(
            tuple(_map(item, change) for item in self.args),
            {name: _map(item, change) for name, item in self.kwargs.items()},
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Example:
        """Every tensor on ``device``; floating ones in ``dtype``, integers and masks unchanged."""

        def move(tensor: Tensor) -> Tensor:
            floating = tensor.is_floating_point()
            return tensor.to(device=device, dtype=dtype if floating else None)

        return self.map(move)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the call, in order, however deeply nested."""
        return [*_tensors(self.args), *_tensors(self.kwargs)]

    def batch(self) -> int | None:
        """The batch size: the leading dimension most tensors share, or None if there is none."""
        leading = Counter(tensor.shape[0] for tensor in self.tensors() if tensor.ndim > 0)
        if not leading:
            return None
        size, count = leading.most_common(1)[0]
        return size if 2 * count > leading.total() else None

    def lengths(self) -> set[int]:
        """Lengths of the sequences, told from the integer tensors (batch, length)."""
        batch = self.batch()
        return set() if batch is None else _lengths(self.tensors(), batch)

    def resized(self, *, batch: int | None = None, shorten: int = 0) -> Example:
        """The same call with another batch size, or with shorter sequences.

        Args:
            batch: The new batch size; rows are repeated in turn, or left off.
            shorten: By how many tokens sequences are cut at their end. What is a sequence is told
                from the integer tensors (batch, length), such as token ids and masks; floating
                tensors (batch, length, width) of the same length are cut with them.

        Raises:
            SourceError: the example has no batch dimension, or no sequence of that length.
        """
        old = self.batch()
        if old is None:
            raise SourceError("example: its tensors share no leading dimension to be the batch")
        lengths = _lengths(self.tensors(), old)
        if shorten and (not lengths or shorten >= min(lengths)):
            raise SourceError(f"example: no sequence longer than {shorten} to cut")
        rows = torch.arange(old if batch is None else batch) % old

        def change(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != old:
                return tensor
            if shorten and tensor.ndim in (2, 3) and tensor.shape[1] in lengths:
                tensor = tensor[:, : tensor.shape[1] - shorten]
            return tensor[rows.to(tensor.device)]

        changed = self.map(change)
        return Example(changed.args, {k: _rows(v, old, rows) for k, v in changed.kwargs.items()})


def variants(example: Example) -> tuple[Example, ...]:
    """Calls of other shapes than ``example``: one row more, then sequences a third shorter.

    Empty where the example has no batch dimension; one call where it has no sequence.
    """
    size = example.batch()
    if size is None:
        return ()
    larger = example.resized(batch=size + 1)
    lengths = _lengths(example.tensors(), size)
    if not lengths or min(lengths) < 3:
        return (larger,)
    return larger, example.resized(shorten=min(lengths) // 3)


def infer_example(model: nn.Module, batch: int = 2, seed: int = 0) -> Example:
    """An example call for ``model``, whatever loaded it.

    It is told from the model's own configuration (``model.config``, or ``pretrained_cfg`` and
    ``default_cfg`` of timm), the signature of its forward and its layers. Sequences are short and
    images as small as the model allows; the last sequence of a batch is padded. Values are on the
    model's device, in its dtype.

    Args:
        model: A model of timm, transformers or diffusers, or of a class derived from one of theirs.
        batch: Batch size.
        seed: Seed of the values; the global generator is not touched.

    Raises:
        SourceError: it cannot be told; the message shows the signature and the call to write.
    """
    from surgery.sources import infer

    example = infer.example_of(model, batch, seed)
    parameters = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
    if not parameters:
        return example
    return example.to(parameters[0].device, parameters[0].dtype)


def _lengths(tensors: list[Tensor], batch: int) -> set[int]:
    return {
        tensor.shape[1]
        for tensor in tensors
        if tensor.ndim == 2 and tensor.shape[0] == batch and not tensor.is_floating_point()
    }


def _rows(value: Any, batch: int, rows: Tensor) -> Any:
    """A list with one plain entry per row, such as image shapes, for the rows that are kept."""
    if not isinstance(value, list):
        return value
    entries = cast("list[Any]", value)
    if len(entries) != batch or _tensors(entries):
        return entries
    return [entries[int(row)] for row in rows]


def _tensors(value: Any) -> list[Tensor]:
    return list(_walk(value))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in cast("dict[Any, Any]", value).values():
            yield from _walk(item)
    elif isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            yield from _walk(item)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value)
        return {key: _map(item, change) for key, item in items.items()}
    if isinstance(value, (list, tuple)):
        sequence = cast("list[Any] | tuple[Any, ...]", value)
        return type(sequence)(_map(item, change) for item in sequence)
    return value
