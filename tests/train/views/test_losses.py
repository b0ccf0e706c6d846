import numpy as np

from surgery.train.views import Series, canvas, groups, losses, read_run
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


def test_runs_without_an_evaluation_are_drawn(tmp_path) -> None:
    (record,) = records(tmp_path, "a", seeds=1)
    log = record.path / "log.jsonl"
    kept = [line for line in log.read_text().splitlines() if "evaluation" not in line]
    log.write_text("\n".join(kept) + "\n")

    figure = losses.curves(groups([read_run(record.path)]))

    assert figure.axes[1].texts[0].get_text() == "no evaluation yet"
    assert "no evaluation" in figure.legends[0].get_texts()[0].get_text()
