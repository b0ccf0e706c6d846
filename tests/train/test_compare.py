import json
import math
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import ConfigError, TrainingError
from surgery.train.compare import (
    Difference,
    Spread,
    compare,
    differences,
    finished,
    seconds_per_step,
    student,
)
from surgery.train.config import PretrainConfig
from surgery.train.views import read_run

STEPS = 40


def config(name: str, **changes: Any) -> PretrainConfig:
    data: dict[str, Any] = {
        "name": name,
        "model": {"source": "preset:llama-tiny"},
        "data": {"kind": "text", "length": 16},
        "objective": {"kind": "language"},
        "optim": {"name": "adamw", "lr": 1e-3},
        "train": {"steps": STEPS, "batch": 4},
        "evaluate": {"every": 10, "samples": 8},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        data[section] = {**data[section], field: value} if field else value
    return PretrainConfig.parse(data)


class Trainer:
    """Writes what a run leaves, from a loss by name and seed, and counts its calls."""

    def __init__(self, losses: dict[tuple[str, int], float], *, rate: float = 0.5) -> None:
        self.losses = losses
        self.rate = rate
        self.calls: list[tuple[str, int]] = []

    def __call__(self, config: PretrainConfig, out: Path) -> int:
        self.calls.append((config.name, config.seed))
        floor = self.losses[config.name, config.seed]
        if floor == math.inf:
            raise TrainingError("the loss is not finite")
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(config.to_yaml())
        rate = self.rate if config.name == "a" else 1.1 * self.rate
        lines: list[dict[str, Any]] = []
        for step in range(10, config.train.steps + 1, 10):
            loss = floor * config.train.steps / step
            lines += [
                {"kind": "step", "step": step, "loss": loss, "seconds": rate * step},
                {"kind": "evaluation", "step": step, "loss": loss, "perplexity": math.exp(loss)},
            ]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out / "model").mkdir(exist_ok=True)
        return 1000 if config.name == "a" else 1200


LOSSES = {
    ("a", 0): 1.0,
    ("a", 1): 1.1,
    ("a", 2): 1.2,
    ("b", 0): 0.9,
    ("b", 1): 1.0,
    ("b", 2): 1.1,
}


def test_a_comparison_from_end_to_end(tmp_path: Path) -> None:
    trainer = Trainer(LOSSES)
    told: list[str] = []

    found = compare(
        [config("a"), config("b")], [0, 1, 2], tmp_path, runner=trainer, tell=told.append
    )

    # Seed by seed, so that what is compared runs close together in time.
    assert trainer.calls == [(name, seed) for seed in (0, 1, 2) for name in "ab"]
    assert told[0] == "a, seed 0: training (1 of 6)"
    first, second = found.rows
    assert first.metrics["loss"].mean == pytest.approx(1.1)
    assert first.metrics["loss"].deviation == pytest.approx(0.1)
    assert (first.difference, first.saving, first.time, first.space) == (None,) * 4
    assert second.difference is not None
    assert second.difference.mean == pytest.approx(-0.1)
    assert second.difference.verdict == "lower"
    assert second.time is not None
    assert second.time.mean == pytest.approx(1.1)
    assert second.space is not None
    assert second.space.mean == pytest.approx(1.2)
    assert second.saving is not None
    # Between the evaluations at 30 and 40, where b has 1.2 and 0.9 and a ends with 1.0.
    assert second.saving.runs[0].reached == pytest.approx(30 + 10 * (1.2 - 1.0) / (1.2 - 0.9))
    assert {path.name for path in tmp_path.iterdir()} == {
        "a", "b", "comparison.json", "comparison.md", "losses.png",
    }  # fmt: skip
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["rows"][1]["difference"]["verdict"] == "lower"
    text = (tmp_path / "comparison.md").read_text()
    assert "| b | 1 ± 0.1 |" in text
    assert "lower" in text


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    configs = [config("a"), config("b")]
    compare(configs, [0], tmp_path, runner=Trainer(LOSSES))
    again = Trainer(LOSSES)

    compare(configs, [0, 1], tmp_path, runner=again)

    assert again.calls == [("a", 1), ("b", 1)]


def test_a_comparison_goes_on_where_a_run_failed(tmp_path: Path) -> None:
    configs = [config("a"), config("b")]
    with pytest.raises(TrainingError, match="not finite"):
        compare(configs, [0], tmp_path, runner=Trainer({**LOSSES, ("b", 0): math.inf}))
    again = Trainer(LOSSES)

    compare(configs, [0], tmp_path, runner=again)

    assert again.calls == [("b", 0)]


def test_half_a_run_goes_on_and_its_peak_is_not_known(tmp_path: Path) -> None:
    configs = [config("a"), config("b")]
    compare(configs, [0], tmp_path, runner=Trainer(LOSSES))
    (tmp_path / "b" / "seed-0" / "model").rmdir()
    again = Trainer(LOSSES)

    found = compare(configs, [0], tmp_path, runner=again)

    assert again.calls == [("b", 0)]
    assert found.rows[1].space is None


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    compare([config("a"), config("b")], [0], tmp_path, runner=Trainer(LOSSES))

    with pytest.raises(TrainingError, match=r"optim\.lr is 0\.001 and not 0\.01"):
        compare([config("a", optim__lr=0.01), config("b")], [0], tmp_path, runner=Trainer(LOSSES))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__steps": 80}, "train.steps is 40 and not 80"),
        ({"train__batch": 8}, "train.batch is 4 and not 8"),
        ({"data__length": 32}, "data.length is 16 and not 32"),
        ({"evaluate__samples": 4}, "evaluate.samples is 8 and not 4"),
    ],
)
def test_other_budgets_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not have one budget") as caught:
        compare([config("a"), config("b", **changes)], [0], tmp_path, runner=Trainer(LOSSES))

    assert said in str(caught.value)


def test_a_budget_sets_the_steps_of_all_and_nothing_else(tmp_path: Path) -> None:
    found = compare(
        [config("a", train__steps=80), config("b", train__steps=60)],
        [0],
        tmp_path,
        budget=20,
        runner=Trainer(LOSSES),
    )
    assert found.steps == 20

    with pytest.raises(ConfigError, match=r"train\.batch"):
        compare(
            [config("a"), config("b", train__batch=8)],
            [0],
            tmp_path / "other",
            budget=20,
            runner=Trainer(LOSSES),
        )


@pytest.mark.parametrize(
    ("names", "seeds", "said"),
    [
        (["a", "a"], [0], "several configurations are called a"),
        (["a"], [0], "expected two configurations or more"),
        (["a", "b"], [], "expected one seed or more"),
        (["a", "b"], [1, 0, 1], "named twice in 1, 0, 1"),
        (["a", "b/../.."], [0], "cannot name a folder"),
    ],
)
def test_names_and_seeds_must_be_distinct(
    names: list[str], seeds: list[int], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        compare([config(name) for name in names], seeds, tmp_path, runner=Trainer(LOSSES))


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    found = compare([config("a"), config("b")], [0], tmp_path, runner=Trainer(LOSSES))

    difference = found.rows[1].difference
    assert difference is not None
    assert difference.verdict == "one seed"
    assert difference.interval is None
    assert "no interval" in str(difference)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-0.10, -0.11, -0.09], "lower"),
        ([0.10, 0.11, 0.09], "higher"),
        ([-0.3, 0.1, 0.0], "no difference shown"),
        # Two seeds on one side: the interval is too wide to tell.
        ([-0.1, -0.05], "no difference shown"),
    ],
)
def test_a_difference_is_claimed_only_outside_of_its_interval(
    values: list[float], verdict: str
) -> None:
    assert Difference(dict(enumerate(values))).verdict == verdict


def test_the_interval_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 0.1, 0.5, 0.2]
    low, high = stats.t.interval(
        0.95, 3, loc=sum(values) / 4, scale=stats.tstd(values) / math.sqrt(4)
    )

    # Quantiles are written with three decimals.
    assert Difference(dict(enumerate(values))).interval == pytest.approx((low, high), abs=1e-4)
    for freedom in (1, 2, 10, 30, 31, 100, 1000):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)


def test_a_seed_that_ends_in_nan_is_named_and_left_out(tmp_path: Path) -> None:
    losses = {**LOSSES, ("b", 1): math.nan}
    trainer = Trainer(losses)

    found = compare([config("a"), config("b")], [0, 1, 2], tmp_path, runner=trainer)

    row = found.rows[1]
    assert row.lost == (1,)
    assert row.difference is not None
    assert set(row.difference.values) == {0, 2}
    assert "seed 1 has no finite loss" in found.to_markdown()
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][1]["lost"] == [1]


def test_seconds_per_step_leave_the_warm_up_out(tmp_path: Path) -> None:
    run = tmp_path / "a"
    Trainer(LOSSES)(config("a"), run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seconds = iter([50.0, 55.0, 60.0, 100.0])
    for line in lines:
        if line["kind"] == "step":
            line["seconds"] = next(seconds)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    # 5, 5 and 40 seconds for ten steps each; the median of the last two.
    assert seconds_per_step(read_run(run)) == pytest.approx(2.25)


@pytest.mark.parametrize(("load", "busy"), [(0.9, False), (500.0, True)])
def test_a_busy_machine_is_noted(
    load: float, busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, load, 0.0))

    found = compare([config("a"), config("b")], [0], tmp_path, runner=Trainer(LOSSES))

    assert any("a, seed 0: the machine was busy" in note for note in found.notes) is busy


def test_a_run_without_its_model_is_not_finished(tmp_path: Path) -> None:
    run = tmp_path / "a"
    Trainer(LOSSES)(config("a"), run)
    assert finished(config("a"), run)

    (run / "model").rmdir()

    assert not finished(config("a"), run)
    assert not finished(config("a"), tmp_path / "nowhere")


def test_differences_of_nested_settings() -> None:
    one = {"a": 1, "b": {"c": 2, "d": [1]}}
    other = {"a": 1, "b": {"c": 3, "d": [1], "e": 0}}

    assert differences(one, other) == ["b.c is 2 and not 3", "b.e is None and not 0"]
    assert differences(one, one) == []


def test_a_spread_of_one_is_no_spread() -> None:
    assert str(Spread({0: 1.5})) == "1.5"
    assert str(Spread({0: 1.0, 1: 2.0})) == "1.5 ± 0.71"
