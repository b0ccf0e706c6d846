"""How a trace answers what has more than one answer."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """How a trace answers what has more than one answer.

    Attributes:
        replayable: The graph will be run again on other inputs: everything Python is told gets
            a guard, and each guard a node at its place. Off for a trace that is only read.
        hash_symbols: Let a symbolic number be hashed (at the price of a guard). Off at first,
            since libraries that can do without (einops) then keep it symbolic.
        plain_bools: Hand out comparisons of sizes as plain values (with a guard each), for torch
            functions whose parsers refuse symbolic ones.
        plain_numbers: The same for the numbers a module holds.
        keep_caches: Keep tensors in a module's plain dicts: they are no caches after all.
    """

    replayable: bool = False
    hash_symbols: bool = False
    plain_bools: bool = False
    plain_numbers: bool = False
    keep_caches: bool = False
