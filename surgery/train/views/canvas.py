"""Figures that are drawn off screen, and what all of them look like.

No global state of matplotlib is touched: a figure is made with its own canvas, never through
pyplot, so that drawing changes no backend and works in any thread.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from surgery import files
from surgery.errors import TrainingError

# matplotlib leaves its keyword arguments untyped; the names say what is meant.
Axes: TypeAlias = Any
Figure: TypeAlias = Any
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Format = Literal["png", "svg"]

DPI = 130
#: Okabe and Ito's palette (https://jfly.uni-koeln.de/color), then line styles for the rest.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
GREY = "#8a8a8a"
#: Room for a colour bar, as ``Figure.colorbar`` takes it.
BAR: dict[str, Any] = {"fraction": 0.046, "pad": 0.03, "aspect": 24}
_BAR_INCHES = 3.6
#: After a dot that is alone, as in `model.layers` but not in `0..11`, and after a space.
_BREAK = re.compile(r"(?<=[^.]\.)(?=[^.])|(?<= )")


def new_figure(width: float, height: float, *, dpi: int = DPI) -> Figure:
    """An empty figure of that size in inches, laid out so that labels do not collide.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as NewFigure
    except ImportError:
        raise TrainingError(
            "pictures are drawn with matplotlib, which is not installed",
            hint="pip install 'model-surgery[train]'",
        ) from None
    figure: Figure = NewFigure(
        figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white"
    )
    figure.get_layout_engine().set(w_pad=0.16, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def as_array(figure: Figure) -> Array:
    """The picture, ``(height, width, 3)`` uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: Path) -> Path:
    """Write the picture in the format of the suffix; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    # Without the date, drawing the same run twice gives the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(held, format=path.suffix[1:], metadata=metadata)
    files.write(path, held.getvalue())
    return path


def line_look(index: int) -> dict[str, Any]:
    """Colour and line style of the n-th curve; both differ, since not everybody tells colours."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": STYLES[index // len(COLORS) % len(STYLES)],
    }


def bar_shrink(axes: Axes) -> float:
    """How much of the figure's height a colour bar takes: no more than it needs."""
    return min(1.0, _BAR_INCHES / axes.get_figure(root=True).get_figheight())


def ticks(count: int, most: int) -> list[int]:
    """Round places to label on an axis of ``count`` integers: at most about ``most`` of them."""
    step = next(s for s in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 10**9) if count <= s * most)
    return list(range(0, count, step))


def wrapped(text: str, width: int) -> str:
    """A dotted name on as many lines as it needs, broken after dots and at spaces."""
    lines = [""]
    for part in _BREAK.split(text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def plain(axes: Axes) -> None:
    """No frame on the right and on top, and a faint grid."""
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(alpha=0.25)
