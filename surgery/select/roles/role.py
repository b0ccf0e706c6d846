"""What a layer does in the model, as told from the dataflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Features = tuple[int, int] | list[int]
"""Output features as (start, stop), or a list of indices where they do not lie together."""


@dataclass(frozen=True)
class Role:
    """The role of a site.

    Attributes:
        name: One of ``surgery.rules.roles.ROLES``, or None if no role could be told.
        reason: The evidence, or why there is none.
        slices: Of a fused projection, part (``q``, ``k``, ``v``, ``gate``, ``in``, ...) → the
            output features that make it; empty if it is not fused or they could not be told.
        also: Further roles of a layer that does the work of two, such as an output projection
            shared by attention and feed-forward.
    """

    name: str | None
    reason: str
    slices: Mapping[str, Features] = field(default_factory=dict[str, Features])
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every role the site plays."""
        return () if self.name is None else (self.name, *self.also)
