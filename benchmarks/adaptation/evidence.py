"""Methods of fast adaptation side by side: sine waves and few-shot digits.

    python benchmarks/adaptation/evidence.py                                # everything
    python benchmarks/adaptation/evidence.py --only sinusoid-5 --seeds 0,1  # a part of it
    python benchmarks/adaptation/evidence.py --steps 3                      # a trial, apart
    python benchmarks/adaptation/evidence.py --times                        # time the meta-steps
    python benchmarks/adaptation/evidence.py --page                         # write the page anew

Every method gets the same meta-budget: the same number of meta-steps over the same tasks, with the
same learning rate. A cell is one method on one problem with one seed; those that are done stay, so
that the same command goes on where it stopped. Runs stay in ``runs/adaptation``, their numbers go
to ``benchmarks/results/adaptation_evidence.json``, and ``docs/adaptation-evidence.md`` is written
from those.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]

from harness import Ratio, as_data, interleave, table  # noqa: E402
from problems import as_number, learner_of, peak_bytes  # noqa: E402

from surgery import files  # noqa: E402
from surgery.errors import TrainingError  # noqa: E402
from surgery.table import human_bytes  # noqa: E402
from surgery.train.adapt.config import AdaptConfig  # noqa: E402
from surgery.train.adapt.run import adapt  # noqa: E402
from surgery.train.compare import Difference, student  # noqa: E402
from surgery.train.views import canvas  # noqa: E402

RUNS = ROOT / "runs" / "adaptation"
#: A file for each cell that was measured here, so that a run goes on where it stopped.
RESULTS = RUNS / "results"
#: All of them, and those that came with the checkout.
COLLECTED = ROOT / "benchmarks" / "results" / "adaptation_evidence.json"
PAGE = ROOT / "docs" / "adaptation-evidence.md"
PICTURE = ROOT / "docs" / "images" / "adaptation-evidence.png"
SEEDS = (0, 1, 2, 3, 4)
AFTER = (1, 2, 5, 10)
DIVERGED = "diverged.txt"
BASELINE, UNTRAINED, COMPARED = "MAML", "untrained", 5
#: The problem on which the authors' scale is tried beside the formula.
SCALED_ON = "sinusoid-5"
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One kind of task.

    Attributes:
        title: Heading on the page.
        config: Name of the shipped configuration.
        overrides: What differs from it.
        steps: Meta-steps of every run.
        measure: What is reported, and whether more of it is better.
    """

    title: str
    config: str
    overrides: tuple[str, ...]
    steps: int
    measure: str


PROBLEMS = {
    "sinusoid-5": Problem("Sine waves, 5 shots", "sinusoid-maml", ("data.shots=5",), 2000, "loss"),
    "sinusoid-10": Problem("Sine waves, 10 shots", "sinusoid-maml", (), 2000, "loss"),
    "digits-1": Problem("Digits, 5-way 1-shot", "digits-maml", (), 100, "accuracy"),
    "digits-5": Problem("Digits, 5-way 5-shot", "digits-maml", ("data.shots=5",), 100, "accuracy"),
}

#: Method → what it changes.
METHODS: dict[str, tuple[str, ...]] = {
    # A single step that changes nothing: what the inner loop reaches from random weights.
    UNTRAINED: ("train.steps=1", "evaluate.every=1", "optim.lr=1e-12"),
    "MAML": (),
    "Meta-SGD": ("inner.rule=per-parameter",),
    "first order": ("estimator={name: first-order}",),
    **{f"BinomGBML, L = {n}": (f"estimator={{name: binomial, terms: {n}}}",) for n in (1, 2, 3)},
    **{
        # As the authors' code has it: L over the five inner steps.
        f"BinomGBML, L = {n}, scaled": (
            f"estimator={{name: binomial, terms: {n}, scale: {n / 5}}}",
        )
        for n in (1, 2, 3)
    },
    "MetaMirrorDescent": ("map:block_iaf",),
    "legendre": ("map:legendre",),
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if args.times:
        for problem in args.only:
            clock(problem, args.rounds)
    elif not args.page:
        measure_all(args)
    if args.steps is None:
        write_page()


def measure_all(args: argparse.Namespace) -> None:
    warm_up()
    # Seed by seed: an evening that is cut off leaves whole columns.
    for problem in args.only:
        for seed in args.seeds:
            for method in methods_of(problem):
                if args.methods in method:
                    measure(problem, method, seed, args.steps)


def methods_of(problem: str) -> list[str]:
    """Those that are compared on a problem."""
    return [method for method in METHODS if problem == SCALED_ON or "scaled" not in method]


def warm_up() -> None:
    """A run of two steps here: forks then find everything imported, and do not measure that."""
    with tempfile.TemporaryDirectory() as folder:
        adapt(configuration("sinusoid-5", "MAML", 0, 2), out=Path(folder) / "run")


def measure(problem: str, method: str, seed: int, steps: int | None) -> None:
    """Run a cell, unless it was run."""
    folder = (RUNS if steps is None else RUNS.with_name("adaptation-trial")) / problem
    results = RESULTS if steps is None else folder / "results"
    file = results / f"{problem}-{slug(method)}-{seed}.json"
    if file.exists():
        return
    config = configuration(problem, method, seed, steps)
    out = folder / f"{slug(method)}-{seed}"
    # In a fork, so that its peak of memory is its own.
    peak = peak_bytes(partial(train, config, out))
    found: dict[str, Any] = {
        "problem": problem,
        "method": method,
        "seed": seed,
        "meta_steps": config.train.steps,
        "peak_bytes": peak,
    }
    if (out / DIVERGED).exists():
        found["diverged"] = (out / DIVERGED).read_text()
    else:
        found["measured"] = last_evaluation(out)
    results.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps(found, indent=1) + "\n")
    key = PROBLEMS[problem].measure
    said = found.get("diverged") or f"{key} {found['measured'][key]}"
    print(f"{problem}, {method}, seed {seed}: {said}", flush=True)


def train(config: AdaptConfig, out: Path) -> None:
    """A run; one that diverges, which is a result too, leaves a note of it."""
    try:
        adapt(config, out=out, resume=True)
    except TrainingError as error:
        if "diverged" not in error.message:
            raise
        files.write(out / DIVERGED, error.message)


def last_evaluation(out: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "evaluation"][-1]
    return {key: as_number(v) for key, v in last.items() if key not in ("kind", "step")}


def configuration(problem: str, method: str, seed: int, steps: int | None) -> AdaptConfig:
    chosen = PROBLEMS[problem]
    count = steps or chosen.steps
    changes = [each for each in METHODS[method] if not each.startswith("map:")]
    overrides = [
        *chosen.overrides,
        f"name={problem}-{slug(method)}",
        f"seed={seed}",
        f"train.steps={count}",
        f"evaluate.every={count}",
        f"evaluate.inner_steps={[k for k in AFTER if k != COMPARED]}",
        f"checkpoint.every={max(1, count // 4)}",
        f"log.every={max(1, count // 50)}",
        "log.tensorboard=false",
    ]
    overrides += changes
    maps = [each.removeprefix("map:") for each in METHODS[method] if each.startswith("map:")]
    overrides += [f"rules={json.dumps(mirror(name))}" for name in maps]
    return AdaptConfig.load(chosen.config, overrides)


def mirror(name: str) -> dict[str, Any]:
    """A map over every parameter of the model."""
    return {"version": 1, "recipe": name, "rules": [{"pass": "mirror", "with": {"map": name}}]}


def write_page() -> None:
    """The page and its picture, from the cells that are done."""
    cells, times = collected()
    data = {"cells": cells, "times": times}
    files.write(COLLECTED, json.dumps(data, indent=1) + "\n")
    found = {name: [c for c in cells if c["problem"] == name] for name in PROBLEMS}
    found = {name: ours for name, ours in found.items() if ours}
    parts = [HEAD, *(section(name, ours, times.get(name, {})) for name, ours in found.items())]
    asked = sum(map(len, map(methods_of, PROBLEMS))) * len(SEEDS)
    if len(cells) < asked:
        parts.append(f"{asked - len(cells)} of {asked} cells are not measured yet.\n")
    draw(found)
    files.write(PAGE, "\n".join(parts))


def collected() -> tuple[list[Cell], dict[str, Any]]:
    """The cells, and the times of each problem; what was measured here stands for what came."""
    came = json.loads(COLLECTED.read_text()) if COLLECTED.exists() else {"cells": [], "times": {}}
    ours = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-[0-9].json"))]
    cells = {slot_of(cell): cell for cell in (*came["cells"], *ours)}
    order = [(p, m, seed) for p in PROBLEMS for m in METHODS for seed in SEEDS]
    clocks = {p: RESULTS / f"{p}.times.json" for p in PROBLEMS}
    times = {p: json.loads(path.read_text()) for p, path in clocks.items() if path.exists()}
    return [cells[slot] for slot in order if slot in cells], {**came["times"], **times}


def slot_of(cell: Cell) -> tuple[str, str, int]:
    return cell["problem"], cell["method"], cell["seed"]


HEAD = """# Evidence: fast adaptation

Written by `python benchmarks/adaptation/evidence.py` and, for the times, the same with `--times`;
nothing here was edited by hand.

- **Budget.** Every method sees the same tasks in the same order for the same number of meta-steps,
  with the same rates: 0.001 for AdamW, 0.01 (sine waves) or 0.05 (digits) for the inner loop, which
  trains for 5 steps (`configs/adapt/sinusoid-maml.yaml`, `configs/adapt/digits-maml.yaml`). No rate
  was searched for any method: one that suits a method better may change its place.
- **Sine waves**: perceptron 1-40-40-1, 25 tasks a meta-step, loss on 200 held-out waves.
- **Untrained** is what the same inner loop reaches from random weights.
- **BinomGBML, scaled**: every second derivative times L / K, as the authors' code has it and the
  paper's formula has not (`scale` of the estimator).
- **Digits**: four convolutions of 32 filters, 4 tasks a meta-step, accuracy in % on 100 held-out
  tasks of the digits 5 to 9, which are never trained on. Guessing is right for 20 %.
- **Results** are means over the seeds ± the 95 % interval of the mean by Student's t, after so many
  inner steps. The seeds share the held-out tasks. Training stops where the inner loop of a task
  diverges: such a seed is counted, and its row is of the others.
- **Difference**: after 5 steps, less MAML's, seed by seed, with the 95 % interval. Where it holds
  zero, no difference was shown. The comparisons are not corrected for their number.
- **Time** was measured apart: meta-steps of all methods in turns, one thread, median of the turns,
  and the median of each turn's ratio to MAML with its 95 % interval.
- **Peak memory** is by how much the process of a run grows at most, evaluation included; the median
  over the seeds.

No gradient is clipped. These are short runs on one core: they compare methods under one small
budget and reach no paper's figures (MAML's own runs are of 60,000 meta-steps or more).

![Held-out loss and accuracy by inner steps.](images/adaptation-evidence.png)
"""


def section(name: str, cells: Sequence[Cell], clock: Mapping[str, Any]) -> str:
    problem = PROBLEMS[name]
    baseline = values_of(cells, BASELINE, problem, COMPARED)
    rows = list[list[str]]()
    for method in METHODS:
        ours = [cell for cell in cells if cell["method"] == method]
        if not ours:
            continue
        peak = statistics.median(cell["peak_bytes"] for cell in ours)
        lost = sum("diverged" in cell for cell in ours)
        rows.append(
            [
                method,
                f"{len(ours)} ({lost} diverged)" if lost else str(len(ours)),
                *(spread(values_of(cells, method, problem, k)) for k in AFTER),
                difference(values_of(cells, method, problem, COMPARED), baseline, method),
                *timed(clock, method),
                human_bytes(int(peak)),
            ]
        )
    steps = [f"{problem.measure}, {AFTER[0]} step", *map(str, AFTER[1:])]
    header = ["method", "seeds", *steps, f"{COMPARED} steps less {BASELINE}'s [95%]"]
    header += ["meta-step", f"/ {BASELINE}", "peak memory"]
    budget = f"{max(cell['meta_steps'] for cell in cells)} meta-steps."
    return f"## {problem.title}\n\n{budget}\n\n{table(header, rows)}\n\n{summary(cells, problem)}\n"


def summary(cells: Sequence[Cell], problem: Problem) -> str:
    """Which methods differ from the baseline, in a sentence."""
    baseline = values_of(cells, BASELINE, problem, COMPARED)
    found: dict[str, list[str]] = {"lower": [], "higher": [], "no difference shown": []}
    for method in METHODS:
        shared = values_of(cells, method, problem, COMPARED)
        pairs = {seed: shared[seed] - baseline[seed] for seed in shared if seed in baseline}
        if method != BASELINE and len(pairs) > 1:
            found[Difference(pairs).verdict].append(method)
    said = [f"{kind.capitalize()}: {'; '.join(each)}." for kind, each in found.items() if each]
    what = problem.measure.capitalize()
    return f"{what} after {COMPARED} steps, beside {BASELINE}'s. {' '.join(said)}"


def values_of(cells: Sequence[Cell], method: str, problem: Problem, steps: int) -> dict[int, float]:
    """Seed → what a method reached after so many inner steps; accuracy in %."""
    key = problem.measure + ("" if steps == COMPARED else f"@{steps}")
    scale = 100 if problem.measure == "accuracy" else 1
    ours = [cell for cell in cells if cell["method"] == method]
    return {cell["seed"]: scale * cell["measured"][key] for cell in ours if "measured" in cell}


def half_width(values: Collection[float]) -> float:
    """Of the 95 % interval of a mean; needs two values."""
    return student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Mapping[int, float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values.values())
    if len(values) < 2:
        return f"{mean:.4g}"
    half = half_width(values.values())
    digits = 1 if mean > 10 else 3
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], method: str) -> str:
    shared = [seed for seed in ours if seed in theirs]
    if method == BASELINE or not shared:
        return "-"
    return str(Difference({seed: ours[seed] - theirs[seed] for seed in shared}))


def timed(clock: Mapping[str, Any], method: str) -> list[str]:
    if method not in clock:
        return ["-", "-"]
    each = clock[method]
    ratio = Ratio(**each["ratio"])
    return [
        f"{1e3 * each['seconds']:.0f} ms",
        f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
    ]


def clock(name: str, rounds: int) -> None:
    """Time a meta-step of every method at a problem, in turns."""
    timed_methods = [method for method in methods_of(name) if method != UNTRAINED]
    work: dict[str, Callable[[], object]] = {}
    for method in timed_methods:
        made, _, batches = learner_of(configuration(name, method, 0, None))
        work[method] = partial(made.estimated, batches(made.config.train.batch))
    timings = interleave(work, rounds=rounds, warmup=1)
    found = {
        method: {
            "seconds": as_number(timings.median(method)),
            "ratio": as_data(timings.ratio(method, BASELINE)),
        }
        for method in timed_methods
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    files.write(RESULTS / f"{name}.times.json", json.dumps(found, indent=1) + "\n")
    print(name, json.dumps(found, indent=1), flush=True)


def draw(found: Mapping[str, Sequence[Cell]]) -> None:
    """Loss or accuracy by inner steps, a panel a problem."""
    figure = canvas.new_figure(11.0, 3.6 * math.ceil(len(found) / 2))
    panels = figure.subplots(math.ceil(len(found) / 2), 2, squeeze=False).flat
    for axes, (name, cells) in zip(panels, found.items(), strict=False):
        problem = PROBLEMS[name]
        shown = list[float]()
        for index, method in enumerate(METHODS):
            # Curves of one place would hide each other's intervals.
            shift = 1 + 0.012 * (index - len(METHODS) / 2)
            by = [values_of(cells, method, problem, k).values() for k in AFTER]
            if len(by[0]) < 2:
                continue
            means, halves = [statistics.fmean(v) for v in by], [half_width(v) for v in by]
            at = [k * shift for k in AFTER]
            look = canvas.line_look(index)
            axes.errorbar(at, means, halves, capsize=2, elinewidth=0.8, label=method, **look)
            shown += means
        axes.set_xscale("log")
        if problem.measure == "loss":
            # Intervals of what is close to diverging would leave no room for the rest.
            axes.set_yscale("log", nonpositive="clip")
            axes.set_ylim(0.6 * min(shown), 1.7 * max(shown))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(AFTER, [str(k) for k in AFTER])
        axes.minorticks_off()
        axes.set_title(problem.title, fontsize=10)
        axes.set_ylabel("held-out " + ("accuracy, %" if problem.measure == "accuracy" else "loss"))
        canvas.plain(axes)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("inner steps (trained for 5)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    canvas.save(figure, PICTURE)


def slug(method: str) -> str:
    return "".join(c for c in method.lower().replace(" ", "-") if c.isalnum() or c == "-")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PROBLEMS))
    parser.add_argument(
        "--seeds", type=lambda text: [int(n) for n in text.split(",")], default=list(SEEDS)
    )
    parser.add_argument("--methods", default="", help="those whose name holds this text")
    parser.add_argument("--steps", type=int, help="meta-steps of a trial")
    parser.add_argument("--times", action="store_true", help="time meta-steps, methods in turns")
    parser.add_argument("--rounds", type=int, default=7, help="turns of --times")
    parser.add_argument("--page", action="store_true", help="write the page and stop")
    args = parser.parse_args()
    unknown = [name for name in args.only if name not in PROBLEMS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no problem; known: {', '.join(PROBLEMS)}")
    return args


if __name__ == "__main__":
    main()
