"""LayerIAF: the per-tensor variant of the authors' inverse mirror map (arXiv 2312.13486).

Our own reading: that their variant is per tensor is known, its code was not at hand. A layer is
taken to be one tensor, as in the names of BlockIAF's parts (``layer_encoders.<tensor>``), and all
else as in BlockIAF.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from architectures.mirror.block_iaf import BlockIAF


@dataclass(frozen=True)
class LayerOptions:
    """Options of ``LayerIAF``.

    Attributes:
        shrink: As of ``BlockIAF``.
    """

    shrink: tuple[int, ...] = (2, 2, 2)


class LayerIAF(BlockIAF):
    """``BlockIAF`` with every tensor a block of its own: each depends on all before it.

    This reading is our own, not the authors' numbers: see the head of this file.
    """

    Options: ClassVar[type] = LayerOptions

    def _cut(self) -> Iterator[range]:
        self._check_shrink()
        for index in range(len(self.shapes)):
            yield range(index, index + 1)
