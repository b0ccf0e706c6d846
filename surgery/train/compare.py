"""Several configurations under one budget, over several seeds: who is better, and how surely.

    configs × seeds ──► one run each, in a process of its own ──► log ──► paired differences

A run that is finished is not run again, one that was interrupted goes on, so that the same call
continues a comparison that was cut off. Within one seed all configurations see the same data in
the same order; differences are taken seed by seed, and one is claimed only where its interval
leaves zero out.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from surgery import files
from surgery.errors import ConfigError, TrainingError
from surgery.train.views.equal import Saving, savings
from surgery.train.views.runs import CONFIG, Group, Record, read_run
from surgery.untrusted.documents import read_object

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.train.config import PretrainConfig, RunConfig

C = TypeVar("C", bound="RunConfig")

#: Trains a configuration in a folder, going on from what is there. Returns the peak of memory in
#: bytes, or None where it cannot be known.
Runner = Callable[[C, Path], int | None]
Tell = Callable[[str], None]

MEASURED = "measured.json"
RESULT_JSON, RESULT_MARKDOWN = "comparison.json", "comparison.md"
_MODEL, _AVERAGED = "model", "model-ema"
#: What a fair comparison holds fixed, beside the number of steps.
_SHARED = ("data", "objective", "train.batch", "evaluate.samples")
#: Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Numbers over seeds.

    Attributes:
        values: Seed → value.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Of all seeds."""
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ± {self.deviation:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {"mean": self.mean, "deviation": self.deviation, "values": _keys(self.values)}


@dataclass(frozen=True)
class Difference:
    """Loss of one configuration less that of the first, seed by seed.

    Attributes:
        values: Seed → difference; below zero is better than the first.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Of all seeds."""
        return statistics.fmean(self.values.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% of the mean, by Student's t over seeds; None for one seed."""
        count = len(self.values)
        if count < 2:
            return None
        error = statistics.stdev(self.values.values()) / math.sqrt(count)
        half = student(count - 1) * error
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        """``lower``, ``higher``, ``no difference shown``, or ``one seed``."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        if low <= 0 <= high:
            return "no difference shown"
        return "lower" if high < 0 else "higher"

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.4g} (one seed: no interval)"
        low, high = self.interval
        return f"{self.mean:+.4g} [{low:+.4g}, {high:+.4g}]: {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        interval = None if self.interval is None else list(self.interval)
        return {
            "mean": self.mean,
            "interval": interval,
            "verdict": self.verdict,
            "values": _keys(self.values),
        }


@dataclass(frozen=True)
class Row:
    """One configuration over its seeds.

    Attributes:
        name: Of the configuration.
        metrics: Metric → its value at the last evaluation; ``loss`` among them. A seed whose
            value is not finite is left out, and named in ``lost``.
        lost: Seeds without a finite loss at the end.
        difference: Loss against the first configuration; None for the first.
        saving: Steps to the first configuration's loss; None for the first.
        seconds: Per step, the median over the run.
        time: Seconds per step over those of the first configuration, seed by seed.
        memory: Peak in bytes.
        space: Peak of memory over that of the first configuration, seed by seed.
    """

    name: str
    metrics: Mapping[str, Spread]
    lost: tuple[int, ...]
    difference: Difference | None
    saving: Saving | None
    seconds: Spread | None
    time: Spread | None
    memory: Spread | None
    space: Spread | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "name": self.name,
            "metrics": {name: spread.to_dict() for name, spread in self.metrics.items()},
            "lost": list(self.lost),
            **{
                key: None if value is None else value.to_dict()
                for key, value in {
                    "difference": self.difference,
                    "saving": self.saving,
                    "seconds_per_step": self.seconds,
                    "time_ratio": self.time,
                    "memory": self.memory,
                    "memory_ratio": self.space,
                }.items()
            },
        }


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        steps: Of every run.
        seeds: All of them.
        rows: One per configuration, the first the one that the others are measured against.
        notes: What the runs lacked.
        out: Where the runs are.
    """

    steps: int
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    out: Path

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "steps": self.steps,
            "seeds": list(self.seeds),
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
            "out": str(self.out),
        }

    def view(self) -> Table:
        """As a table for a rich console."""
        from rich.table import Table
        from rich.text import Text

        header, lines = self._cells()
        table = Table(*header, title=self._title(), caption=_CAPTION, caption_justify="left")
        for line in lines:
            table.add_row(*(Text(cell) for cell in line))
        return table

    def to_markdown(self) -> str:
        """As a Markdown table with what its columns mean."""
        header, lines = self._cells()
        rows = [header, ["---"] * len(header), *lines]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"{self._title()}\n\n{table}\n\n{_CAPTION}\n" + (f"\n{notes}" if notes else "")

    def _title(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        return f"{self.steps} steps each, on the same data in the same order; seeds {seeds}"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        others = list(dict.fromkeys(name for row in self.rows for name in row.metrics))
        metrics = ["loss", *(name for name in others if name != "loss")]
        first = self.rows[0].name
        header = [
            "configuration",
            *metrics,
            f"loss less that of {first} [95%]",
            f"steps to the loss of {first}",
            "seconds per step",
            "time ratio",
            "memory ratio",
        ]
        return header, [_line(row, metrics) for row in self.rows]


_CAPTION = (
    "Mean ± standard deviation over seeds, at the last evaluation. Differences and ratios are "
    "taken seed by seed; a difference whose interval holds zero is none. Time is the median over "
    "a run's steps; memory is the accelerator's peak, or that of the process less what its "
    "libraries take."
)


def compare(
    configs: Sequence[PretrainConfig],
    seeds: Sequence[int],
    out: Path,
    *,
    budget: int | None = None,
    runner: Runner[PretrainConfig] | None = None,
    tell: Tell | None = None,
) -> Comparison:
    """Train every configuration with every seed, in ``out/<name>/seed-<seed>``, and compare them.

    Args:
        configs: At least two, the first the one that the others are measured against.
        seeds: Weights, order of the data and noise of a run all come from its seed.
        out: Folder of the runs and of ``comparison.json``, ``comparison.md`` and ``losses.png``.
        budget: Steps of every run, whatever the configurations say.
        runner: Trains one run; by default each has a process of its own, so that memory and time
            are its own too, and under a launcher the ranks that there are.
        tell: Told what is being run.

    Raises:
        ConfigError: names or seeds collide, or the configurations differ in what they train on
            or for how long.
        TrainingError: a run failed; the same call goes on with what is left.
    """
    from surgery.train import apart, engine

    configs = _under_one_budget(configs, budget)
    _check_names(configs)
    _check_seeds(seeds)
    run = runner or (apart.in_a_process if engine.ranks() == 1 else apart.here)
    runs = [(seeded(config, seed), seed) for seed in seeds for config in configs]
    for number, (config, seed) in enumerate(runs, 1):
        folder = out / config.name / f"seed-{seed}"
        done = finished(config, folder)
        what = "finished before" if done else "training"
        _say(tell, f"{config.name}, seed {seed}: {what} ({number} of {len(runs)})")
        if not done:
            train_once(config, folder, run)
    folders = {
        config.name: {seed: out / config.name / f"seed-{seed}" for seed in seeds}
        for config in configs
    }
    result = report(folders, out)
    if engine.main_process():
        _write(result, folders)
    return result


def train_once(config: C, folder: Path, run: Runner[C]) -> None:
    """Train one run, or go on with it, and note its peak of memory beside it."""
    from surgery.train import engine

    # Part of a run has part of its peak: of a run that goes on it is not known.
    whole = not (folder / CONFIG).is_file()
    peak = run(config, folder)
    if engine.main_process():
        found = {"peak_memory": peak if whole else None, "load": os.getloadavg()[1]}
        files.write(folder / MEASURED, json.dumps(found) + "\n")


def report(folders: Mapping[str, Mapping[int, Path]], out: Path) -> Comparison:
    """Compare runs that are there.

    Args:
        folders: Name of a configuration → seed → run folder; the first is the baseline.
        out: Where the result says that the runs are.

    Raises:
        TrainingError: a run is missing or cannot be read.
    """
    records = {
        name: {seed: read_run(path) for seed, path in paths.items()}
        for name, paths in folders.items()
    }
    everything = [record for found in records.values() for record in found.values()]
    first, *_ = records
    together = [Group(name, tuple(found.values())) for name, found in records.items()]
    saved = {saving.name: saving for saving in savings(together)}
    rows = tuple(
        _row(name, found, records[first], saved.get(name), is_first=name == first)
        for name, found in records.items()
    )
    steps = max(record.last_step for record in everything)
    seeds = tuple(dict.fromkeys(seed for found in records.values() for seed in found))
    notes = tuple(
        f"{record.label}: {note}"
        for record in everything
        for note in record.notes
        if "no matrix to draw" not in note
    )
    busy = tuple(note for record in everything for note in _busy(record))
    return Comparison(steps, seeds, rows, (*notes, *busy), out)


def seeded(config: C, seed: int) -> C:
    """The configuration with another seed."""
    return type(config).parse({**config.dump(), "seed": seed})


def finished(config: RunConfig, folder: Path) -> bool:
    """Whether a folder holds this very run, done to its end.

    Raises:
        TrainingError: it holds a run of another configuration.
    """
    written = folder / CONFIG
    if not written.is_file():
        return False
    found = type(config).load(written)
    if found != config:
        raise TrainingError(
            f"{folder} holds a run of another configuration: "
            f"{'; '.join(differences(found.dump(), config.dump()))}",
            hint="name another folder with --out, or remove this one",
        )
    averages = config.objective.kind == "diffusion" and config.objective.ema is not None
    results = [_MODEL, _AVERAGED] if averages else [_MODEL]
    if not all((folder / result).is_dir() for result in results):
        return False
    evaluation = read_run(folder).evaluation
    return len(evaluation) > 0 and int(evaluation.steps[-1]) == config.train.steps


def differences(one: Mapping[str, Any], other: Mapping[str, Any], at: str = "") -> list[str]:
    """Where two nested mappings differ: ``train.lr is 1 and not 2``."""
    found: list[str] = []
    for key in dict.fromkeys([*one, *other]):
        here, there = one.get(key), other.get(key)
        name = f"{at}{key}"
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            inner = cast("Mapping[str, Any]", here), cast("Mapping[str, Any]", there)
            found += differences(*inner, f"{name}.")
        elif here != there:
            found.append(f"{name} is {here!r} and not {there!r}")
    return found


def student(freedom: int) -> float:
    """The two-sided 95% quantile of Student's t."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # Cornish and Fisher's expansion around the normal distribution; off by less than 1e-4 here.
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def seconds_per_step(record: Record) -> float | None:
    """The median over the log's intervals without the first, which warms up; None for too few."""
    series = record.seconds.finite()
    if len(series) < 3:
        return None
    rates = np.diff(series.values) / np.diff(series.steps)
    return float(np.median(rates[1:] if len(rates) > 1 else rates))


def _under_one_budget(
    configs: Sequence[PretrainConfig], budget: int | None
) -> list[PretrainConfig]:
    """The configurations with the same number of steps.

    Raises:
        ConfigError: they differ in what has to be equal.
    """
    from surgery.train.config import PretrainConfig

    if len(configs) < 2:
        raise ConfigError(
            f"expected two configurations or more to compare, received {len(configs)}",
            hint="surgery pretrain --compare a.yaml b.yaml",
        )
    dumps = [config.dump() for config in configs]
    if budget is not None:
        dumps = [{**dump, "train": {**dump["train"], "steps": budget}} for dump in dumps]
    shared = _SHARED if budget is not None else ("train.steps", *_SHARED)
    first, *others = dumps
    for config, dump in zip(configs[1:], others, strict=True):
        found = [
            line
            for key in shared
            for line in differences({key: _at(first, key)}, {key: _at(dump, key)})
        ]
        if found:
            raise ConfigError(
                f"{configs[0].name} and {config.name} do not have one budget: "
                f"in {configs[0].name} {'; '.join(found)}",
                hint="give them the same data, objective, train.batch, evaluate.samples and "
                "train.steps; --budget sets the steps of all",
            )
    return [PretrainConfig.parse(dump) for dump in dumps]


def _at(data: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data


def _check_names(configs: Sequence[PretrainConfig]) -> None:
    names = [config.name for config in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"several configurations are called {', '.join(twice)}",
            hint="give each its own `name`: it is the name of its folder",
        )
    for name in names:
        if name in {".", ".."} or "/" in name or "\\" in name:
            raise ConfigError(f"a configuration is called {name!r}, which cannot name a folder")


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds:
        raise ConfigError("expected one seed or more, received none", hint="--seeds 0,1,2")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"a seed is named twice in {', '.join(map(str, seeds))}",
            hint="a run that is repeated is no second sample",
        )


def _row(
    name: str,
    found: Mapping[int, Record],
    first: Mapping[int, Record],
    saving: Saving | None,
    *,
    is_first: bool,
) -> Row:
    loss = _last(found, "loss")
    baseline = _last(first, "loss")
    paired = {seed: loss[seed] - baseline[seed] for seed in loss if seed in baseline}
    names = dict.fromkeys(metric for record in found.values() for metric in record.evaluations)
    metrics = {metric: _last(found, metric) for metric in names}
    seconds = _known({seed: seconds_per_step(record) for seed, record in found.items()})
    their_seconds = _known({seed: seconds_per_step(record) for seed, record in first.items()})
    memory = _known({seed: _memory(record.path) for seed, record in found.items()})
    their_memory = _known({seed: _memory(record.path) for seed, record in first.items()})
    return Row(
        name=name,
        metrics={metric: Spread(values) for metric, values in metrics.items() if values},
        lost=tuple(seed for seed in found if seed not in loss),
        difference=None if is_first or not paired else Difference(paired),
        saving=None if is_first else saving,
        seconds=_spread(seconds),
        time=None if is_first else _spread(_ratios(seconds, their_seconds)),
        memory=_spread(memory),
        space=None if is_first else _spread(_ratios(memory, their_memory)),
    )


def _last(found: Mapping[int, Record], metric: str) -> dict[int, float]:
    """The last value of every seed that has a finite one."""
    series = {
        seed: record.evaluations[metric]
        for seed, record in found.items()
        if metric in record.evaluations
    }
    last = {seed: float(each.values[-1]) for seed, each in series.items() if len(each)}
    return {seed: value for seed, value in last.items() if math.isfinite(value)}


def _known(values: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if value is not None}


def _ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    return {seed: ours[seed] / theirs[seed] for seed in ours if theirs.get(seed)}


def _spread(values: Mapping[int, float]) -> Spread | None:
    return Spread(values) if values else None


def _memory(folder: Path) -> int | None:
    peak = _measured(folder).get("peak_memory")
    return peak if isinstance(peak, int) else None


def _busy(record: Record) -> Iterator[str]:
    """A note where the machine had more to do than it has cores."""
    load, cores = _measured(record.path).get("load"), os.cpu_count() or 1
    if isinstance(load, float) and load > cores + 0.5:
        yield (
            f"{record.label}: the machine was busy (load {load:.1f} on {cores} cores), so that its "
            "time says little"
        )


def _measured(folder: Path) -> dict[str, Any]:
    path = folder / MEASURED
    return read_object(path, error=TrainingError) if path.is_file() else {}


def _line(row: Row, metrics: Sequence[str]) -> list[str]:
    return [
        row.name + "".join(f" (seed {seed} has no finite loss)" for seed in row.lost),
        *(str(row.metrics.get(metric, "-")) for metric in metrics),
        *(
            "-" if value is None else str(value)
            for value in (row.difference, row.saving, row.seconds, row.time, row.space)
        ),
    ]


def _write(result: Comparison, folders: Mapping[str, Mapping[int, Path]]) -> None:
    from surgery.train.views import canvas, losses

    text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
    files.write(result.out / RESULT_JSON, text)
    files.write(result.out / RESULT_MARKDOWN, result.to_markdown())
    together = [
        Group(name, tuple(read_run(path) for path in paths.values()))
        for name, paths in folders.items()
    ]
    canvas.save(losses.curves(together), result.out / "losses.png")


def _say(tell: Tell | None, text: str) -> None:
    from surgery.train import engine

    if tell is not None and engine.main_process():
        tell(text)


def _keys(values: Mapping[int, float]) -> dict[str, float]:
    return {str(seed): value for seed, value in values.items()}
