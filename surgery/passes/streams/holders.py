"""What holds blocks goes on looking as if it held nothing else.

The segments of a list of layers are a child of the list, so that their parameters are found,
moved, sharded and saved with it; but ``for layer in layers``, ``len(layers)`` and ``layers[-1]``
are about layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from surgery.capture.graft import stock_class
from surgery.passes.streams.capturing import capturing
from surgery.passes.streams.segment import CHILD
from surgery.tree import children

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class ListHolder(_Module):
    """Put over the class of an ``nn.Sequential`` or ``nn.ModuleList`` with rewired blocks."""

    def __len__(self) -> int:
        return len(_blocks(self))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(_blocks(self).values()))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _part(self, index)
        return list(_blocks(self).values())[index]

    def children(self) -> Iterator[nn.Module]:
        """All children, as torch needs them; to a forward that is captured, the blocks."""
        return iter(list(_blocks(self).values())) if capturing() else super().children()

    def append(self, module: nn.Module) -> Any:
        """As in torch; the new block is none of those that were rewired."""
        segments = self._modules.pop(CHILD)
        try:
            return super().append(module)  # type: ignore[misc]
        finally:
            self._modules[CHILD] = segments


class DictHolder(_Module):
    """Put over the class of an ``nn.ModuleDict`` with rewired blocks."""

    def __len__(self) -> int:
        return len(_blocks(self))

    def __iter__(self) -> Iterator[str]:
        return iter(list(_blocks(self)))

    def __contains__(self, key: object) -> bool:
        return key in _blocks(self)

    def keys(self) -> Any:
        """Names of the blocks."""
        return _blocks(self).keys()

    def items(self) -> Any:
        """Names and blocks."""
        return _blocks(self).items()

    def values(self) -> Any:
        """The blocks."""
        return _blocks(self).values()


def holder_mixin(holder: nn.Module) -> type | None:
    """What hides the segments from those who iterate over a holder; None if nobody can."""
    if isinstance(holder, nn.Sequential | nn.ModuleList):
        return ListHolder
    return DictHolder if isinstance(holder, nn.ModuleDict) else None


def _blocks(holder: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in children(holder).items() if name != CHILD}


def _part(holder: nn.Module, index: slice) -> nn.Module:
    """A part of a holder, of its stock class as torch makes it: the blocks, without segments."""
    blocks = _blocks(holder)
    cls = stock_class(holder)
    if issubclass(cls, nn.ModuleList):
        return cls(list(blocks.values())[index])
    from collections import OrderedDict

    return cls(OrderedDict(list(blocks.items())[index]))  # type: ignore[arg-type]
