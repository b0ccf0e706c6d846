"""The answer to "is this site meant?": yes or no, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Match:
    """Whether a site is meant by a rule, with the reason.

    Attributes:
        ok: Whether it is.
        reason: Why, or why not, as a clause about the site ("it is a LayerNorm, not Linear").
        key: The selector that decided (``path``, ``role``, ...), ``except``, or None when it was
            the pass itself.
        distance: How far the site is from being meant: 0 for a match, up to 1 for one selector
            that misses altogether.
    """

    ok: bool
    reason: str
    key: str | None = None
    distance: float = 1.0

    @classmethod
    def yes(cls, reason: str, key: str | None = None) -> Match:
        """A match."""
        return cls(True, reason, key, 0.0)

    @classmethod
    def no(cls, reason: str, key: str | None = None, distance: float = 1.0) -> Match:
        """No match; ``distance`` in (0, 1] says how near it came."""
        return cls(False, reason, key, distance)
