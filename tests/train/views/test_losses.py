import json

import numpy as np
import pytest

from surgery.train.views import Group, Series, canvas, groups, losses, read_run
from tests.train.views.folders import make_run


def records(tmp_path, names: str, seeds: int = 2):
    return [
        read_run(make_run(tmp_path / f"{n}{s}", {}, name=n, seed=s, floor=1.5 - 0.1 * i))
        for i, n in enumerate(names)
        for s in range(seeds)
    ]


def test_one_legend_entry_for_every_configuration(tmp_path) -> None:
    figure = losses.curves(groups(records(tmp_path, "abc")))

    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert [text.partition(":")[0] for text in texts] == ["a", "b", "c"]
    assert "fewer steps (2 seeds)" in texts[1]
    assert "fewer" not in texts[0]


def test_every_curve_has_a_look_of_its_own() -> None:
    looks = [tuple(canvas.line_look(index).values()) for index in range(28)]

    assert len(set(looks)) == 28


def test_a_mean_over_seeds_is_taken_at_steps_they_share(tmp_path) -> None:
    one, other = records(tmp_path, "a")
    log = other.path / "log.jsonl"
    kept = [line for line in log.read_text().splitlines() if '"step": 150,' not in line]
    log.write_text("\n".join(kept) + "\n")

    mean = losses.mean_evaluation([one, read_run(other.path)])

    assert 150 not in mean.steps
    assert len(mean) == len(one.evaluation) - 1
    at = one.evaluation.steps.tolist().index(200)
    assert mean.values[mean.steps.tolist().index(200)] == one.evaluation.values[at]


def test_smoothing_is_a_running_mean_with_gaps_kept() -> None:
    values = np.arange(200.0)
    values[50] = np.nan
    found = losses.smoothed(Series(np.arange(200), values)).values

    assert np.isnan(found[50])
    assert found[100] == 100.0
    # The window of two points to each side lacks the point that is not finite.
    assert found[51] == np.mean([49, 51, 52, 53])
    assert np.isnan(found).sum() == 1


def test_short_curves_are_left_as_they_are() -> None:
    series = Series(np.arange(5), np.array([3.0, 1.0, 4.0, 1.0, 5.0]))

    assert np.array_equal(losses.smoothed(series).values, series.values)


def changed_losses(record, change) -> None:
    """Rewrite every loss of a run's log."""
    log = record.path / "log.jsonl"
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            line["loss"] = change(line["kind"], line["loss"], line["step"])
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_loss_that_begins_high_and_ends_at_zero_is_drawn_on_a_logarithmic_axis(tmp_path) -> None:
    (record,) = records(tmp_path, "a", seeds=1)

    def change(kind: str, loss: float, step: int) -> float:
        if kind == "evaluation":
            return loss
        return 1e4 if step < 60 else 0.0

    changed_losses(record, change)
    run = read_run(record.path)
    left, right = losses.curves([Group("a", (run,))]).axes

    assert left.get_yscale() == right.get_yscale() == "log"
    lowest, highest = run.evaluation.values.min(), run.evaluation.values.max()
    assert left.get_ylim()[0] == pytest.approx(lowest / 10)
    bottom, top = right.get_ylim()
    assert 0.8 * lowest < bottom < lowest
    assert top < 1.3 * highest


def test_a_negative_loss_is_drawn_on_a_linear_axis(tmp_path) -> None:
    (record,) = records(tmp_path, "a", seeds=1)
    changed_losses(record, lambda _kind, loss, step: 1e4 if step < 60 else loss - 10)

    left, right = losses.curves([Group("a", (read_run(record.path),))]).axes

    assert left.get_yscale() == right.get_yscale() == "linear"


def test_runs_without_an_evaluation_are_drawn(tmp_path) -> None:
    (record,) = records(tmp_path, "a", seeds=1)
    log = record.path / "log.jsonl"
    kept = [line for line in log.read_text().splitlines() if "evaluation" not in line]
    log.write_text("\n".join(kept) + "\n")

    figure = losses.curves(groups([read_run(record.path)]))

    assert figure.axes[1].texts[0].get_text() == "no evaluation yet"
    assert "no evaluation" in figure.legends[0].get_texts()[0].get_text()
