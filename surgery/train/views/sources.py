"""From how many states a site draws: the effective number of its sources over time.

With p the coefficients of a site over their sum, by magnitude, the effective number is exp(H) with
H = -Σ p log p, their entropy in nats. It is k + 1 where all are equal, 1 where one is everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgery.train.views import canvas
from surgery.train.views.canvas import Array, Axes, Figure
from surgery.train.views.runs import Frames


def effective_sources(values: Array) -> Array:
    """The exponential of the entropy of every row, ``(n, K, K)`` to ``(n, K)``.

    NaN where a row is all zero, as at an identity start, or not finite.
    """
    weights = np.abs(np.tril(values))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = weights / total
        logs = np.where(shares > 0, np.log(shares), 0.0)
    entropy = -(shares * logs).sum(-1)
    return np.where(np.isfinite(total[..., 0]) & (total[..., 0] > 0), np.exp(entropy), np.nan)


def over_time(stacks: Sequence[Frames]) -> Figure:
    """Per stack: the effective numbers by site over the steps, and as a share of k + 1."""
    figure = canvas.new_figure(11.5, 3.3 * len(stacks) + 0.7)
    grid = figure.subplots(len(stacks), 2, squeeze=False)
    for row, frames in enumerate(stacks):
        found = effective_sources(frames.values)
        _lines(figure, grid[row, 0], frames, found)
        _map(figure, grid[row, 1], frames, found)
        for axes in grid[row]:
            axes.set_title(canvas.wrapped(frames.stack, 44), fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=9)
    figure.suptitle(
        "Effective number of sources of every site: exp(entropy) of its coefficients", fontsize=12
    )
    return figure


def _lines(figure: Figure, axes: Axes, frames: Frames, found: Array) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = ScalarMappable(Normalize(0, max(1, frames.sites - 1)), "viridis")
    for site in range(frames.sites):
        color = colors.to_rgba(np.array(site))
        mark = "o" if len(frames.steps) == 1 else None
        axes.plot(frames.steps, found[:, site], color=color, linewidth=1.3, marker=mark)
    axes.set_ylim(0.8, max(2.0, 1.05 * frames.sites))
    axes.set_ylabel("effective number of sources", fontsize=9)
    axes.tick_params(labelsize=8)
    canvas.plain(axes)
    bar = figure.colorbar(colors, ax=axes, fraction=0.05, pad=0.02)
    bar.set_ticks(canvas.ticks(frames.sites, 8))
    bar.ax.tick_params(labelsize=8)
    bar.set_label("site k", fontsize=9)


def _map(figure: Figure, axes: Axes, frames: Frames, found: Array) -> None:
    share = found / np.arange(1, frames.sites + 1)
    edges = _edges(frames.steps.astype(float))
    image = axes.pcolormesh(
        edges,
        np.arange(frames.sites + 1) - 0.5,
        np.ma.masked_invalid(share.T),
        vmin=0,
        vmax=1,
        cmap="cividis",
        rasterized=True,
    )
    axes.set_facecolor("#9a9a9a")
    axes.invert_yaxis()
    axes.set_yticks(canvas.ticks(frames.sites, 8))
    axes.set_ylabel("site k", fontsize=9)
    axes.tick_params(labelsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share of its k + 1 states\n(1: all equal; grey: all zero)", fontsize=8)


def _edges(steps: Array) -> Array:
    """Where the cell of each step begins and ends: halfway to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    between = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0]], between, [steps[-1]]])
