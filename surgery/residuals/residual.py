"""What is known about one residual addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

Kind = Literal["identity", "cast", "scaled", "pooled", "projection"]
"""What happens to the shortcut before it is added, the strongest of it."""


@dataclass(frozen=True, eq=False)
class Residual:
    """One residual addition: ``node = shortcut + sum(branches)``.

    Attributes:
        node: The addition. Of several that add up parallel branches, the last.
        entry: The addition that has the shortcut as an operand; ``node`` unless parallel branches
            are added one by one.
        shortcut: The operand as it enters the addition; same shape as ``node``.
        source: What the shortcut was before it was cast, scaled, pooled or projected, and what the
            branches are computed from.
        branches: What is added to the shortcut; several for parallel branches, such as attention
            and MLP side by side.
        kind: What happens to the shortcut between ``source`` and ``shortcut``.
        shape: Shape of ``node`` at the example.
        dtype: Its type.
        owner: Dotted path of the module whose forward performs the addition; empty for the root.
        block: Dotted path of the innermost module whose call contains all of the branches.
        where: ``file:line`` of the addition.
        in_place: Whether the addition writes to one of its operands.
        follows: The residual addition that the source comes from by way of single tensors, such as
            a normalisation; None where a stream starts.
        continues: Whether the state has kept its shape since ``follows``, but for a reshape.
    """

    node: fx.Node
    entry: fx.Node
    shortcut: fx.Node
    source: fx.Node
    branches: tuple[fx.Node, ...]
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: str
    block: str
    where: str
    in_place: bool
    follows: fx.Node | None = None
    continues: bool = False

    def __str__(self) -> str:
        added = " + ".join(branch.name for branch in self.branches)
        owner = self.owner or "(the model)"
        return f"{owner}: {self.shortcut.name} + {added} ({self.kind}), {self.where}"
