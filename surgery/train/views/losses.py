"""Loss curves of several runs, and the steps saved at equal loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgery.train.views import canvas
from surgery.train.views.canvas import Array, Axes, Figure
from surgery.train.views.equal import Saving, savings, target_of
from surgery.train.views.runs import Group, Record, Series

_SMOOTH = 50
"""The training loss is averaged over a window of one part in so many of its points."""
_FEW = 20
"""So few points are not smoothed."""
_ZOOM = 0.3
"""Part of the steps that the right panel leaves out."""
_LOG_FROM = 20.0
"""A loss that falls by this factor is drawn on a logarithmic axis."""


def curves(groups: Sequence[Group]) -> Figure:
    """Training loss, smoothed, and evaluation loss; on the right the evaluations of the last part.

    The first group is the baseline that the others are measured against.
    """
    found = [None, *savings(groups)]
    figure = canvas.new_figure(12.5, 4.6 + 0.26 * len(groups))
    left, right = figure.subplots(1, 2)
    handles: list[object] = []
    for index, (group, saving) in enumerate(zip(groups, found, strict=True)):
        look = canvas.line_look(index)
        for run in group.runs:
            smooth = smoothed(run.train)
            left.plot(smooth.steps, smooth.values, linewidth=0.9, alpha=0.45, **look)
        _evaluations(left, group, look)
        _evaluations(right, group, look)
        handles.append(_handle(look, legend_of(group, saving)))
    _target(right, groups, [saving for saving in found if saving is not None])
    left.set_title("training (thin, smoothed) and evaluation loss", fontsize=10)
    marks = f"\ndashed: the last loss of {groups[0].name}; diamonds: where others reach it"
    several = len(groups) > 1
    right.set_title(f"evaluation loss, last part{marks if several else ''}", fontsize=10)
    _finish(left, right, groups)
    figure.legend(handles=handles, loc="outside lower left", fontsize=9, frameon=False)
    return figure


def smoothed(series: Series) -> Series:
    """The mean over a window around every point; values that are not finite are left out."""
    half = max(2, len(series) // _SMOOTH // 2) if len(series) >= _FEW else 0
    good = np.isfinite(series.values)
    # Cumulative sums with a zero in front: a window is a difference of two of them.
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, series.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    at = np.arange(len(series))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(series))
    number = counts[last] - counts[first]
    means = (sums[last] - sums[first]) / np.maximum(number, 1)
    # A gap stays a gap, however wide the window.
    return Series(series.steps, np.where(good & (number > 0), means, np.nan))


def legend_of(group: Group, saving: Saving | None) -> str:
    """One line per group: name, last loss, what it saves."""
    last = [found[1] for run in group.runs if (found := target_of(run)) is not None]
    parts = [group.name]
    if not last:
        parts.append("no evaluation")
    elif len(last) == 1:
        parts.append(f"final evaluation loss {last[0]:.4g}")
    else:
        spread = float(np.std(last, ddof=1))
        parts.append(
            f"final evaluation loss {np.mean(last):.4g} ± {spread:.2g} ({len(last)} seeds)"
        )
    if saving is not None:
        parts.append(str(saving))
    if any(run.unfinished for run in group.runs):
        parts.append("unfinished")
    return ": ".join([parts[0], "; ".join(parts[1:])])


def mean_evaluation(runs: Sequence[Record]) -> Series:
    """The mean over runs at the steps that all of them evaluated."""
    series = [run.evaluation for run in runs if len(run.evaluation)]
    if not series:
        return Series(np.array([], dtype=np.int64), np.array([]))
    steps = series[0].steps
    for other in series[1:]:
        steps = np.intersect1d(steps, other.steps)
    rows = [one.values[np.isin(one.steps, steps)] for one in series]
    return Series(steps, np.mean(rows, axis=0))


def _evaluations(axes: Axes, group: Group, look: dict[str, object]) -> None:
    if len(group.runs) > 1:
        for run in group.runs:
            axes.plot(run.evaluation.steps, run.evaluation.values, linewidth=0.6, alpha=0.4, **look)
    mean = mean_evaluation(group.runs)
    axes.plot(mean.steps, mean.values, linewidth=1.6, marker="o", markersize=3.5, **look)


def _handle(look: dict[str, object], label: str) -> object:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, linewidth=2, **look)  # pyright: ignore[reportArgumentType]


def _target(axes: Axes, groups: Sequence[Group], found: Sequence[Saving]) -> None:
    """The baseline's last loss as a line, and where the others reach it."""
    targets = [target[1] for run in groups[0].runs if (target := target_of(run)) is not None]
    if not found or not targets:
        return
    level = float(np.mean(targets))
    axes.axhline(level, color=canvas.GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    for index, saving in enumerate(found, 1):
        steps = [run.reached for run in saving.runs if run.reached is not None]
        if not steps or saving.saved is None:
            continue
        color = canvas.line_look(index)["color"]
        axes.plot(
            [float(np.mean(steps))], [level], marker="D", markersize=7, color=color,
            markeredgecolor="white", linestyle="none", zorder=5,
        )  # fmt: skip


def _finish(left: Axes, right: Axes, groups: Sequence[Group]) -> None:
    runs = [run for group in groups for run in group.runs]
    if low := _bottom(runs):
        _logarithmic(left)
        _logarithmic(right)
        left.set_ylim(bottom=low)
    last = max((run.last_step for run in runs), default=1) or 1
    _zoom(right, runs, last)
    for axes in (left, right):
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel("loss", fontsize=9)
        axes.tick_params(labelsize=8)
        canvas.plain(axes)


def _bottom(runs: Sequence[Record]) -> float | None:
    """Where a logarithmic axis begins; None if a linear one will do, or a loss is negative.

    A training loss may round to zero. It then leaves the picture at the bottom, at a tenth of the
    lowest evaluation at most.
    """
    held_out = np.concatenate([_finite(run.evaluation) for run in runs])
    values = np.concatenate([held_out, *(_finite(smoothed(run.train)) for run in runs)])
    positive = values[values > 0]
    if not positive.size or values.min() < 0 or positive.max() <= _LOG_FROM * positive.min():
        return None
    lowest = held_out[held_out > 0].min(initial=np.inf) / 10
    return float(max(values.min(), lowest if np.isfinite(lowest) else positive.min()))


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis labelled 0.1, 0.2, 0.5, 1 and so on."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _zoom(axes: Axes, runs: Sequence[Record], last: int) -> None:
    """Limit the right panel to the last part of the steps and what happens there."""
    start = _ZOOM * last
    shown = _late(runs, start)
    if not shown.size:
        start, shown = 0.0, _late(runs, 0.0)
    if not shown.size:
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", transform=axes.transAxes)
        return
    axes.set_xlim(start, 1.02 * last)
    logarithmic = axes.get_yscale() == "log" and bool((shown > 0).any())
    low = float(shown[shown > 0].min() if logarithmic else shown.min())
    high = float(shown.max())
    if logarithmic:
        part = 1.01 * (high / low) ** 0.06
        axes.set_ylim(low / part, high * part)
        return
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin if low - margin > 0 or low <= 0 else low, high + margin)


def _late(runs: Sequence[Record], start: float) -> Array:
    """Finite evaluation losses from a step on, of all runs."""
    kept = [run.evaluation.finite() for run in runs]
    return np.concatenate([one.values[one.steps >= start] for one in kept])


def _finite(series: Series) -> Array:
    return series.finite().values
