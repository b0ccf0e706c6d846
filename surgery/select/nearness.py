"""How near a site came to being meant: 0 for a match, 1 for nothing in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache

from surgery.rules.match import parse_comparison

_NO_SIZE = 0.9
# A segment too many or too few is a smaller slip than another word in its place.
_GAP = 0.6


@lru_cache(maxsize=65536)
def word_distance(wanted: str, found: str) -> float:
    """Share of the characters of two words that differ."""
    if wanted == found:
        return 0.0
    return 1.0 - SequenceMatcher(None, wanted, found, autojunk=False).ratio()


def path_distance(pattern: str, path: str) -> float:
    """How much of a path would have to change for a glob to match it, by aligning segments.

    Args:
        pattern: A glob or a ``re:`` pattern, as in ``surgery.rules.match.path_matches``.
        path: Dotted path.
    """
    if pattern.startswith("re:"):
        words = [word for word in re.findall(r"\w+", pattern[3:]) if not word.isdigit()]
        segments = ("**", *(part for word in words for part in (word, "**")))
    else:
        segments = tuple(pattern.split("."))
    return _alignment(segments, tuple(path.split(".")) if path else ())


def _alignment(pattern: Sequence[str], path: Sequence[str]) -> float:
    """Edit distance over segments, ``**`` free, as a share of the longer of the two."""
    row = [0.0]
    for _ in path:
        row.append(row[-1] + _GAP)
    for part in pattern:
        wild = part == "**"
        above, row = row, [row[0] + (0.0 if wild else _GAP)]
        for at, segment in enumerate(path):
            if wild:
                row.append(min(row[at], above[at + 1]))
                continue
            change = above[at] + _segment_distance(part, segment)
            row.append(min(change, row[at] + _GAP, above[at + 1] + _GAP))
    fixed = sum(part != "**" for part in pattern)
    return min(1.0, row[-1] / max(1, fixed, len(path) if "**" not in pattern else 0))


@lru_cache(maxsize=65536)
def _segment_distance(part: str, segment: str) -> float:
    """Distance of one segment of a glob, its wildcards matching what they like."""
    if part in ("*", segment):
        return 0.0
    if not any(sign in part for sign in "*?[{"):
        return word_distance(part, segment)
    options = re.sub(r"[{}]", ",", part).split(",")
    literals = [re.sub(r"\[[^\]]*\]|[*?]", "", option) for option in options]
    return min(0.9 * word_distance(literal, segment) for literal in literals)


def sizes_distance(comparisons: Mapping[str, str], sizes: Mapping[str, int]) -> float:
    """How far sizes are from satisfying comparisons, relative to the bounds."""
    worst = 0.0
    for key, text in comparisons.items():
        size = sizes.get(key)
        if size is None:
            return _NO_SIZE
        bounds = [bound for _, bound in parse_comparison(text)]
        gap = min(abs(size - bound) / max(size, bound, 1) for bound in bounds)
        worst = max(worst, gap)
    return min(_NO_SIZE, 0.05 + worst)
