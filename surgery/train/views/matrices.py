"""Coefficient matrices as pictures: at the end of a run, over time, moving.

Row k holds what is added to the output of block k, column j the state that enters block j. Only
the lower triangle exists: a state cannot be added before it was computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from surgery.errors import TrainingError
from surgery.train.views import canvas
from surgery.train.views.canvas import Array, Axes, Figure
from surgery.train.views.runs import Frames

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

_MOST_ROWS = 3
"""More stacks than this stand in two columns."""
_MOST_COLUMNS, _MOST_FRAMES = 6, 100
STATE, SITE = "state j (enters block j)", "site k"


@dataclass(frozen=True)
class Scale:
    """One colour scale for many matrices. Colour goes with the root of a coefficient.

    Linear colours would show nothing of rows whose coefficients are small, such as the uniform
    1/(k + 1) of a deep stack beside the 1 of its first site.

    Attributes:
        top: Largest magnitude that is shown.
        signed: Whether coefficients below zero are shown.
    """

    top: float
    signed: bool

    @classmethod
    def over(cls, matrices: Iterable[Array]) -> Scale:
        """The scale that holds the finite values of all of them, each ``(K, K)``."""
        values = np.concatenate([lower(matrix) for matrix in matrices])
        values = values[np.isfinite(values)]
        if not values.size:
            return cls(1.0, signed=False)
        top = float(np.abs(values).max())
        # Rounding errors of a matrix that is zero are no reason for a scale with two sides.
        return cls(top or 1.0, signed=bool(values.min() < -1e-6 * top))

    @property
    def norm(self) -> Normalize:
        """Coefficient to position on the colour map."""
        from matplotlib.colors import FuncNorm

        functions = (_signed_root, _signed_square)
        return FuncNorm(functions, vmin=-self.top if self.signed else 0.0, vmax=self.top)

    @property
    def colors(self) -> Colormap:
        """Light is zero; what is no number is grey."""
        from matplotlib import colormaps

        return colormaps["RdBu_r" if self.signed else "YlGnBu"].with_extremes(bad="#9a9a9a")

    @property
    def marks(self) -> list[float]:
        """Where the colour bar is labelled."""
        positive = [_rounded(self.top * share) for share in (0.04, 0.25)] + [self.top]
        return [*(-value for value in reversed(positive) if self.signed), 0.0, *positive]


def _rounded(value: float) -> float:
    """To one digit, so that a label says exactly where it stands."""
    return float(f"{value:.1g}")


def _signed_root(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: Any) -> Any:
    return np.sign(values) * np.square(values)


def lower(matrix: Array) -> Array:
    """The entries on and below the diagonal, ``(K (K + 1) / 2,)``."""
    return matrix[np.tril_indices(len(matrix))]


def as_numbers(matrix: Tensor) -> Array:
    """A coefficient matrix as numbers, ``(K, K)`` float64.

    Raises:
        TrainingError: it is not square.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise TrainingError(
            f"a coefficient matrix has the shape (K, K), got {tuple(matrix.shape)}",
            hint="surgery.shortcuts(model) gives such matrices",
        )
    return matrix.detach().double().cpu().numpy()


def start_of(matrix: Array) -> str | None:
    """What a first record shows: one of the ways shortcuts start, by name; None for another.

    Args:
        matrix: ``(K, K)``.
    """
    sites = len(matrix)
    rows = np.tril(np.ones_like(matrix))
    known = {
        "uniform start, 1/(k+1) in row k": rows / np.arange(1, sites + 1)[:, None],
        "uniform start, 1/(K-j) in column j": rows / np.arange(sites, 0, -1)[None, :],
        "identity start, all zero": np.zeros_like(matrix),
        "identity start, the unit matrix": np.eye(sites),
    }
    # Coefficients are computed in float32, or were trained for no step.
    return next(
        (name for name, start in known.items() if np.allclose(matrix, start, atol=1e-6)), None
    )


def matrix_image(matrix: Tensor, title: str) -> Array:
    """One coefficient matrix as a picture, for TensorBoard's ``add_image(dataformats="HWC")``.

    The colour scale goes from 0 to 1, or from -1 to 1, and further only where coefficients do, so
    that pictures of one run can be compared.

    Args:
        matrix: ``(K, K)``, a value of ``surgery.shortcuts(model)``.
        title: Written above it.

    Returns:
        ``(height, width, 3)`` uint8.

    Raises:
        TrainingError: the matrix is not square, or matplotlib is not installed.
    """
    numbers = as_numbers(matrix)
    found = Scale.over([numbers])
    scale = Scale(max(1.0, found.top), found.signed)
    figure = canvas.new_figure(5.2, 4.6, dpi=100)
    axes = figure.add_subplot()
    draw_matrix(axes, numbers, scale)
    axes.set_title(canvas.wrapped(title, 44), fontsize=11)
    add_scale(figure, [axes], scale)
    return canvas.as_array(figure)


def draw_matrix(
    axes: Axes, matrix: Array, scale: Scale, *, labels: bool = True, most_ticks: int = 12
) -> Any:
    """Draw the lower triangle of a ``(K, K)`` matrix and return its image."""
    sites = len(matrix)
    # What is no number stays, in a colour of its own; what lies above the diagonal is cut away.
    image = axes.imshow(
        np.ma.masked_invalid(matrix),
        norm=scale.norm,
        cmap=scale.colors,
        interpolation="nearest",
        extent=(-0.5, sites - 0.5, sites - 0.5, -0.5),
    )
    image.set_clip_path(_triangle(sites), axes.transData)
    _outline(axes, sites)
    places = canvas.ticks(sites, most_ticks)
    axes.set_xticks(places)
    axes.set_yticks(places)
    axes.tick_params(labelsize=8, length=2.5, pad=2)
    axes.spines[["right", "top"]].set_visible(False)
    if labels:
        axes.set_xlabel(STATE, fontsize=9)
        axes.set_ylabel(SITE, fontsize=9)
    return image


def _triangle(sites: int) -> Any:
    """The staircase around the entries on and below the diagonal."""
    from matplotlib.path import Path

    corners = [(-0.5, sites - 0.5), (-0.5, -0.5)]
    for site in range(sites):
        corners += [(site + 0.5, site - 0.5), (site + 0.5, site + 0.5)]
    return Path([*corners, corners[0]])


def _outline(axes: Axes, sites: int) -> None:
    x, y = np.asarray(_triangle(sites).vertices).T
    axes.plot(x, y, color="#555555", linewidth=0.6, clip_on=False, solid_joinstyle="miter")


def add_scale(
    figure: Figure, axes: Sequence[Axes], scale: Scale, *, label: str = "coefficient"
) -> None:
    """The colour bar beside some axes."""
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(norm=scale.norm, cmap=scale.colors)
    room = dict(canvas.BAR, shrink=canvas.bar_shrink(axes[0]))
    bar = figure.colorbar(mappable, ax=list(axes), ticks=scale.marks, **room)
    bar.ax.set_yticklabels([f"{mark:.2g}" for mark in scale.marks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)
    bar.outline.set_linewidth(0.5)


def at_the_end(stacks: Sequence[Frames]) -> Figure:
    """The last matrix of every stack, and beside it what has changed since the first record."""
    last = [frames.values[-1] for frames in stacks]
    change = [frames.values[-1] - frames.values[0] for frames in stacks]
    columns = 1 if len(stacks) <= _MOST_ROWS else 2
    rows = math.ceil(len(stacks) / columns)
    side = _side(stacks, 3.9 if rows == 1 else 3.2)
    # Wider than the matrices are, so that it is the height that limits them: labels need room.
    figure = canvas.new_figure(2 * (columns * (side + 0.55) + 1.0), rows * (side + 0.35) + 1.0)
    left, right = figure.subfigures(1, 2)
    steps = stacks[0].steps
    _grid(left, stacks, last, Scale.over(last), columns)
    left.suptitle(f"Coefficients at step {steps[-1]}\n", fontsize=12)
    _grid(right, stacks, change, _scale_of_change(change), columns, label="change")
    right.suptitle(f"Change since step {steps[0]}\n{_named_start(stacks)}", fontsize=12)
    return figure


def over_time(stacks: Sequence[Frames]) -> Figure:
    """Every stack at up to six steps, from the first record to the last, in one scale."""
    scale = _scale_of_run(stacks)
    chosen = evenly(len(stacks[0].steps), _MOST_COLUMNS)
    side = _side(stacks, 2.3)
    width, height = len(chosen) * (side + 0.15) + 1.9, len(stacks) * side + 1.3
    figure = canvas.new_figure(max(width, 4.5), height)
    grid = figure.subplots(len(stacks), len(chosen), squeeze=False)
    for row, frames in enumerate(stacks):
        for column, at in enumerate(chosen):
            axes = grid[row, column]
            draw_matrix(axes, frames.values[at], scale, labels=False, most_ticks=6)
            if row == 0:
                axes.set_title(f"step {frames.steps[at]}", fontsize=10)
            if row == len(stacks) - 1:
                axes.set_xlabel("state j", fontsize=9)
        grid[row, 0].set_ylabel(f"{canvas.wrapped(frames.stack, 18)}\nsite k", fontsize=9)
    add_scale(figure, list(grid.flat), scale)
    start = _named_start(stacks)
    figure.suptitle(
        f"Coefficients over time{start and f'; step {stacks[0].steps[0]} is the {start}'}\n"
        "row k: what is added after block k; column j: the state that enters block j",
        fontsize=11,
    )
    return figure


def animated(stacks: Sequence[Frames], total: int | None) -> Iterator[Array]:
    """Up to a hundred pictures of every stack, one per record, in one scale.

    Args:
        stacks: At least one, with at least one record.
        total: Steps of the whole run, if they are known.

    Yields:
        ``(height, width, 3)`` uint8, all of one size and layout.
    """
    scale = _scale_of_run(stacks)
    columns = min(math.ceil(math.sqrt(len(stacks))), 3)
    side = _side(stacks, 4.0 if len(stacks) == 1 else 3.0)
    rows = math.ceil(len(stacks) / columns)
    figure = canvas.new_figure(columns * (side + 0.5) + 1.2, rows * (side + 0.3) + 0.8, dpi=100)
    images = _grid(figure, stacks, [frames.values[0] for frames in stacks], scale, columns)
    # As wide as it will get, so that the layout holds for every frame.
    last = int(stacks[0].steps[-1])
    title = figure.suptitle(_clock(last, total), fontsize=12)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for at in evenly(len(stacks[0].steps), _MOST_FRAMES):
        for frames, image in zip(stacks, images, strict=True):
            image.set_data(np.ma.masked_invalid(frames.values[at]))
        title.set_text(_clock(int(stacks[0].steps[at]), total))
        yield canvas.as_array(figure)


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})


def _clock(step: int, total: int | None) -> str:
    return f"step {step}" if total is None else f"step {step} of {total}"


def _grid(
    figure: Figure,
    stacks: Sequence[Frames],
    matrices: Sequence[Array],
    scale: Scale,
    columns: int,
    *,
    label: str = "coefficient",
) -> list[Any]:
    """One matrix per stack, in rows of ``columns``, with one colour bar; returns the images."""
    rows = math.ceil(len(stacks) / columns)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    images: list[Any] = []
    for at, (frames, matrix) in enumerate(zip(stacks, matrices, strict=True)):
        most = 12 if len(stacks) == 1 else 8
        images.append(draw_matrix(grid[at], matrix, scale, labels=False, most_ticks=most))
        grid[at].set_title(canvas.wrapped(frames.stack, 30), fontsize=9)
        if at % columns == 0:
            grid[at].set_ylabel(SITE, fontsize=9)
        if at + columns >= len(stacks):
            grid[at].set_xlabel(STATE, fontsize=9)
    for axes in grid[len(stacks) :]:
        axes.remove()
    add_scale(figure, grid[: len(stacks)], scale, label=label)
    return images


def _side(stacks: Sequence[Frames], wanted: float) -> float:
    """Inches of one matrix: a deep stack needs room for its cells."""
    return max(wanted, 0.045 * max(frames.sites for frames in stacks))


def _scale_of_run(stacks: Sequence[Frames]) -> Scale:
    return Scale.over([matrix for frames in stacks for matrix in frames.values])


def _scale_of_change(changes: Sequence[Array]) -> Scale:
    """With two sides always: what grows is red, what shrinks is blue."""
    return Scale(Scale.over(changes).top, signed=True)


def _named_start(stacks: Sequence[Frames]) -> str:
    """The way the stacks started, if it is one and known; else nothing."""
    names = {start_of(frames.values[0]) for frames in stacks}
    (name,) = names if len(names) == 1 else (None,)
    return name or ""
