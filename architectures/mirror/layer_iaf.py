"""LayerIAF: the per-tensor variant of the authors' inverse mirror map (arXiv 2312.13486)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from architectures.mirror.block_iaf import BlockIAF


class LayerIAF(BlockIAF):
    """``BlockIAF`` with every tensor a block of its own: each depends on all before it."""

    @dataclass(frozen=True)
    class Options:
        """Options of the map.

        Attributes:
            shrink: As of ``BlockIAF``.
        """

        shrink: tuple[int, ...] = (2, 2, 2)

    def _cut(self) -> Iterator[range]:
        self._check_shrink()
        for index in range(len(self.shapes)):
            yield range(index, index + 1)
