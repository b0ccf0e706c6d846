"""Coefficient matrices as pictures: at the end of a run, over time, moving.

Row k holds what is added to the output of block k, column j the state that enters block j. Only
the lower triangle exists: a state cannot be added before it was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from surgery.errors import TrainingError
from surgery.train.views import canvas
from surgery.train.views.canvas import Array, Axes, Figure

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

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
    bar = figure.colorbar(mappable, ax=list(axes), fraction=0.046, pad=0.03, ticks=scale.marks)
    bar.ax.set_yticklabels([f"{mark:.2g}" for mark in scale.marks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)
    bar.outline.set_linewidth(0.5)
