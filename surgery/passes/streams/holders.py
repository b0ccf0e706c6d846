"""What holds blocks goes on looking as if it held nothing else.

The segments of a list of layers, and mirror maps, are a child of the list, so that their parameters
are found, moved, sharded and saved with it; but ``for layer in layers``, ``len(layers)`` and
``layers[-1]`` are about layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from surgery.capture.graft import graft, grafts, stock_class, ungraft
from surgery.passes.links import MAPS
from surgery.passes.streams.capturing import capturing
from surgery.passes.streams.segment import CHILD
from surgery.tree import children

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

#: Children that passes add to a holder of blocks.
_ADDED = (CHILD, MAPS)


class ListHolder(_Module):
    """Put over the class of an ``nn.Sequential`` or ``nn.ModuleList`` that holds such a child."""

    def __len__(self) -> int:
        return len(blocks(self))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(blocks(self).values()))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _part(self, index)
        return list(blocks(self).values())[index]

    def children(self) -> Iterator[nn.Module]:
        """All children, as torch needs them; to a forward that is captured, the blocks."""
        return iter(list(blocks(self).values())) if capturing() else super().children()

    def append(self, module: nn.Module) -> Any:
        """As in torch; the new block is none of those that were rewired."""
        added = {name: self._modules.pop(name) for name in _ADDED if name in self._modules}
        try:
            return super().append(module)  # type: ignore[misc]
        finally:
            self._modules.update(added)


class DictHolder(_Module):
    """Put over the class of an ``nn.ModuleDict`` that holds such a child."""

    def __len__(self) -> int:
        return len(blocks(self))

    def __iter__(self) -> Iterator[str]:
        return iter(list(blocks(self)))

    def __contains__(self, key: object) -> bool:
        return key in blocks(self)

    def keys(self) -> Any:
        """Names of the blocks."""
        return blocks(self).keys()

    def items(self) -> Any:
        """Names and blocks."""
        return blocks(self).items()

    def values(self) -> Any:
        """The blocks."""
        return blocks(self).values()


def cover(holder: nn.Module) -> None:
    """Hide what is about to be added from those who iterate over a holder."""
    mixin = holder_mixin(holder)
    if mixin is not None and mixin not in grafts(holder):
        graft(holder, mixin)


def uncover(holder: nn.Module) -> None:
    """Take off what hid the added children, once there are none."""
    mixin = holder_mixin(holder)
    if mixin is not None and not any(name in children(holder) for name in _ADDED):
        ungraft(holder, mixin)


def holder_mixin(holder: nn.Module) -> type | None:
    """What hides added children from those who iterate over a holder; None if nobody can."""
    if isinstance(holder, nn.Sequential | nn.ModuleList):
        return ListHolder
    return DictHolder if isinstance(holder, nn.ModuleDict) else None


def blocks(holder: nn.Module) -> dict[str, nn.Module]:
    """The children of a holder that no pass added, by name."""
    return {name: child for name, child in children(holder).items() if name not in _ADDED}


def _part(holder: nn.Module, index: slice) -> nn.Module:
    """A part of a holder, of its stock class as torch makes it: the blocks, without segments."""
    found = blocks(holder)
    cls = stock_class(holder)
    if issubclass(cls, nn.ModuleList):
        return cls(list(found.values())[index])
    from collections import OrderedDict

    return cls(OrderedDict(list(found.items())[index]))  # type: ignore[arg-type]
