"""Pictures of what a run learned: its coefficient matrices, their graph, its loss curves.

    read_run ──► groups ──► figures (matrices, graph, sources, losses) ──► PNG or SVG, GIF or WebP

matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

from surgery.train.views.draw import Drawn, draw
from surgery.train.views.equal import Reach, Saving, first_reach, savings
from surgery.train.views.matrices import matrix_image
from surgery.train.views.runs import Frames, Group, Record, Series, groups, read_run

__all__ = [
    "Drawn",
    "Frames",
    "Group",
    "Reach",
    "Record",
    "Saving",
    "Series",
    "draw",
    "first_reach",
    "groups",
    "matrix_image",
    "read_run",
    "savings",
]
