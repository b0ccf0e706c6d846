"""Example inputs: what a model is called with when it is traced or verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

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
