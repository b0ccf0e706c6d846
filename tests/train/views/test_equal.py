import math

import numpy as np
import pytest

from surgery.train.views import Group, Series, first_reach, read_run, savings
from tests.train.views.folders import make_run


def series(*points: tuple[int, float]) -> Series:
    steps, values = zip(*points, strict=True)
    return Series(np.array(steps), np.array(values))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("points", "target", "step"),
    [
        ([(100, 3.0), (200, 2.0), (300, 1.0)], 1.5, 250.0),
        ([(100, 3.0), (200, 2.0), (300, 1.0)], 2.0, 200.0),
        ([(100, 3.0), (200, 2.0)], 1.9, None),
        ([(100, 1.0), (200, 0.5)], 2.0, 100.0),
        # Down, up again, down: the first time counts.
        ([(100, 3.0), (200, 1.0), (300, 3.0), (400, 1.0)], 2.0, 150.0),
        # Nothing to interpolate from.
        ([(100, 3.0), (200, NAN), (300, 1.0)], 2.0, 300.0),
        ([(100, INF), (200, 1.0)], 2.0, 200.0),
        ([(100, NAN), (200, NAN)], 2.0, None),
    ],
)
def test_first_reach(points: list[tuple[int, float]], target: float, step: float | None) -> None:
    assert first_reach(series(*points), target) == step


def test_no_evaluation_reaches_nothing() -> None:
    assert first_reach(Series(np.array([]), np.array([])), 1.0) is None


def group(tmp_path, name: str, floors: dict[int, float]) -> Group:
    runs = [
        read_run(make_run(tmp_path / name / str(seed), {}, name=name, seed=seed, floor=floor))
        for seed, floor in floors.items()
    ]
    return Group(name, tuple(runs))


def test_savings_are_taken_seed_by_seed(tmp_path) -> None:
    base = group(tmp_path, "base", {0: 1.5, 1: 1.6})
    better = group(tmp_path, "better", {0: 1.2, 1: 1.3})

    (found,) = savings([base, better])

    assert [run.seed for run in found.runs] == [0, 1]
    for run, partner, ours in zip(found.runs, base.runs, better.runs, strict=True):
        target = partner.evaluation.values[-1]
        assert run.target == target
        # Interpolated by numpy, on the falling curve turned round.
        curve = ours.evaluation
        step = np.interp(target, curve.values[::-1], curve.steps[::-1])
        assert run.reached == pytest.approx(step, rel=1e-12)
    shares = [run.saved for run in found.runs]
    assert found.saved == (pytest.approx(np.mean(shares)), pytest.approx(np.std(shares, ddof=1)))
    assert str(found).endswith("fewer steps (2 seeds)")


def test_a_mean_is_given_only_where_every_seed_reached_the_loss(tmp_path) -> None:
    base = group(tmp_path, "base", {0: 1.5, 1: 1.5})
    mixed = group(tmp_path, "mixed", {0: 1.2, 1: 1.9})

    (found,) = savings([base, mixed])

    assert found.saved is None
    assert str(found) == "loss of base reached in 1 of 2 seeds"
    assert "not reached" in str(found.runs[1])


def test_seeds_without_a_partner_are_named(tmp_path) -> None:
    base = group(tmp_path, "base", {0: 1.5, 1: 1.5})
    other = group(tmp_path, "other", {1: 1.2, 7: 1.2})

    (found,) = savings([base, other])

    assert [run.seed for run in found.runs] == [1]
    assert found.unpaired == (7,)
    assert found.to_dict()["unpaired"] == [7]


def test_two_single_runs_are_compared_whatever_their_seeds(tmp_path) -> None:
    (found,) = savings([group(tmp_path, "a", {0: 1.5}), group(tmp_path, "b", {5: 1.2})])

    assert len(found.runs) == 1
    assert found.saved is not None


def test_a_baseline_that_ends_in_nan_is_no_target(tmp_path) -> None:
    base = group(tmp_path, "base", {0: 1.5})
    log = base.runs[0].path / "log.jsonl"
    log.write_text(log.read_text() + '{"kind": "evaluation", "step": 501, "loss": "nan"}\n')
    base = Group("base", (read_run(log.parent),))

    (found,) = savings([base, group(tmp_path, "b", {0: 1.2})])

    assert found.runs == ()
    assert found.saved is None
