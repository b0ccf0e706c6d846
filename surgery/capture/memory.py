"""Which tensors of a trace share memory, and which nodes have written to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from surgery.capture import private


@dataclass
class _Memory:
    """One storage.

    Attributes:
        owner: The storage. It is held: the key of a freed one is soon that of another.
        nodes: What has a tensor in it.
        writes: What wrote to it.
    """

    owner: object
    nodes: list[fx.Node] = field(default_factory=list[fx.Node])
    writes: list[fx.Node] = field(default_factory=list[fx.Node])


class Memories:
    """The storages of one trace, by identity.

    Keeps ``meta["written_by"]`` of every node whose tensor lies in a storage that was written to.
    """

    def __init__(self) -> None:
        self._found: dict[int, _Memory] = {}

    def add(self, node: fx.Node, fake: torch.Tensor) -> None:
        """A node has this tensor."""
        memory = self._of(fake)
        memory.nodes.append(node)
        if memory.writes:
            node.meta["written_by"] = memory.writes

    def write(self, node: fx.Node, target: fx.Node, fake: torch.Tensor) -> None:
        """A node wrote to the tensor of ``target``."""
        memory = self._of(fake)
        memory.writes.append(node)
        for each in (*memory.nodes, target):
            each.meta["written_by"] = memory.writes

    def _of(self, fake: torch.Tensor) -> _Memory:
        key, owner = private.storage_of(fake)
        return self._found.setdefault(key, _Memory(owner))
