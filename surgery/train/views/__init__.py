"""Pictures of what a run learned: its coefficient matrices, their graph, its loss curves."""

from __future__ import annotations

from surgery.train.views.matrices import matrix_image

__all__ = ["matrix_image"]
