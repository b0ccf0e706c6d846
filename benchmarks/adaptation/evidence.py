"""Methods of fast adaptation side by side: sine waves and few-shot digits.

    python benchmarks/adaptation/evidence.py                                # everything
    python benchmarks/adaptation/evidence.py --only sinusoid-5 --seeds 0,1  # a part of it
    python benchmarks/adaptation/evidence.py --steps 3                      # a trial, apart
    python benchmarks/adaptation/evidence.py --page                         # write the page anew

Every method gets the same meta-budget: the same number of meta-steps over the same tasks, with the
same learning rate. A cell is one method on one problem with one seed; those that are done stay, so
that the same command goes on where it stopped. Runs stay in ``runs/adaptation``, numbers go to
``benchmarks/adaptation/results``, and ``docs/adaptation-evidence.md`` is written from those.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]

from harness import table  # noqa: E402
from problems import as_number, peak_bytes  # noqa: E402

from surgery import files, shipped  # noqa: E402
from surgery.table import human_bytes  # noqa: E402
from surgery.train.adapt.config import AdaptConfig  # noqa: E402
from surgery.train.adapt.run import adapt  # noqa: E402

RUNS = ROOT / "runs" / "adaptation"
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "adaptation-evidence.md"
SEEDS = (0, 1, 2, 3, 4)
AFTER = (1, 2, 5, 10)
#: Two-sided 95 % points of Student's t, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


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
    "sinusoid-5": Problem("Sine waves, 5 shots", "sinusoid-maml", ("data.shots=5",), 1000, "loss"),
    "sinusoid-10": Problem("Sine waves, 10 shots", "sinusoid-maml", (), 1000, "loss"),
    "digits-1": Problem("Digits, 5-way 1-shot", "digits-maml", (), 100, "accuracy"),
    "digits-5": Problem("Digits, 5-way 5-shot", "digits-maml", ("data.shots=5",), 100, "accuracy"),
}

#: Method → what it changes.
METHODS: dict[str, tuple[str, ...]] = {
    "MAML": (),
    "Meta-SGD": ("inner.rule=per-parameter",),
    "first order": ("estimator={name: first-order}",),
    **{f"BinomGBML, L = {n}": (f"estimator={{name: binomial, terms: {n}}}",) for n in (1, 2, 3)},
    "MetaMirrorDescent": ("map:block_iaf",),
    "legendre": ("map:legendre",),
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if not args.page:
        warm_up()
        for problem in args.only:
            for seed in args.seeds:
                for method in METHODS:
                    measure(problem, method, seed, args.steps)
    if args.steps is None:
        write_page()


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
    peak = peak_bytes(partial(adapt, config, out=out, resume=True))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "evaluation"][-1]
    times = [line["seconds"] / line["step"] for line in lines if line["kind"] == "step"]
    found = {
        "problem": problem,
        "method": method,
        "seed": seed,
        "meta_steps": config.train.steps,
        "measured": {key: as_number(v) for key, v in last.items() if key not in ("kind", "step")},
        "seconds_per_meta_step": as_number(times[-1]),
        "peak_bytes": peak,
    }
    results.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps(found, indent=1) + "\n")
    key = PROBLEMS[problem].measure
    print(f"{problem}, {method}, seed {seed}: {key} {found['measured'][key]}", flush=True)


def configuration(problem: str, method: str, seed: int, steps: int | None) -> AdaptConfig:
    chosen = PROBLEMS[problem]
    count = steps or chosen.steps
    changes = [each for each in METHODS[method] if not each.startswith("map:")]
    overrides = [
        *chosen.overrides,
        *changes,
        f"name={problem}-{slug(method)}",
        f"seed={seed}",
        f"train.steps={count}",
        f"evaluate.every={count}",
        f"evaluate.inner_steps={[k for k in AFTER if k != 5]}",
        f"checkpoint.every={max(1, count // 4)}",
        f"log.every={max(1, count // 50)}",
        "log.tensorboard=false",
    ]
    maps = [each.removeprefix("map:") for each in METHODS[method] if each.startswith("map:")]
    overrides += [f"rules={json.dumps(mirror(name))}" for name in maps]
    return AdaptConfig.load(shipped.adaptations()[chosen.config], overrides)


def mirror(name: str) -> dict[str, Any]:
    """A map over every parameter of the model."""
    return {"version": 1, "recipe": name, "rules": [{"pass": "mirror", "with": {"map": name}}]}


def write_page() -> None:
    """The page, from the cells that are done."""
    cells = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    parts = [HEAD]
    for name, problem in PROBLEMS.items():
        ours = [cell for cell in cells if cell["problem"] == name]
        if ours:
            parts.append(section(problem, ours))
    missing = len(PROBLEMS) * len(METHODS) * len(SEEDS) - len(cells)
    if missing:
        parts.append(f"{missing} of {missing + len(cells)} cells are not measured yet.\n")
    files.write(PAGE, "\n".join(parts))


HEAD = """# Evidence: fast adaptation

Written by `python benchmarks/adaptation/evidence.py`, which goes on where it stopped. Every method
has the same meta-budget: the same meta-steps over the same tasks with the same learning rate
(`configs/adapt/sinusoid-maml.yaml`, `configs/adapt/digits-maml.yaml`). Sine waves: perceptron
1-40-40-1, 25 tasks a meta-step, loss on 200 held-out waves. Digits: four convolutions of 32
filters, 4 tasks a meta-step, accuracy on 100 held-out tasks of the digits 5 to 9, which are never
trained on. Mean over the seeds ± 95 % interval (Student's t), after so many inner steps; training
is for 5. These are short runs on one core: they compare methods under one budget and reach no
paper's figures.
"""


def section(problem: Problem, cells: Sequence[Mapping[str, Any]]) -> str:
    rows = list[list[str]]()
    for method in METHODS:
        ours = [cell for cell in cells if cell["method"] == method]
        if not ours:
            continue
        after = [
            spread(
                [cell["measured"][problem.measure + ("" if k == 5 else f"@{k}")] for cell in ours]
            )
            for k in AFTER
        ]
        seconds = statistics.median(cell["seconds_per_meta_step"] for cell in ours)
        peak = statistics.median(cell["peak_bytes"] for cell in ours)
        rows.append(
            [method, str(len(ours)), *after, f"{1e3 * seconds:.0f} ms", human_bytes(int(peak))]
        )
    steps = " ".join(f"{problem.measure}, {k}" for k in AFTER[:1])
    header = ["method", "seeds", steps, *map(str, AFTER[1:]), "meta-step", "peak memory"]
    budget = f"{cells[0]['meta_steps']} meta-steps."
    return f"## {problem.title}\n\n{budget}\n\n{table(header, rows)}\n"


def spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def slug(method: str) -> str:
    return "".join(c for c in method.lower().replace(" ", "-") if c.isalnum() or c == "-")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PROBLEMS))
    parser.add_argument(
        "--seeds", type=lambda text: [int(n) for n in text.split(",")], default=list(SEEDS)
    )
    parser.add_argument("--steps", type=int, help="meta-steps of a trial")
    parser.add_argument("--page", action="store_true", help="write the page and stop")
    args = parser.parse_args()
    unknown = [name for name in args.only if name not in PROBLEMS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no problem; known: {', '.join(PROBLEMS)}")
    return args


if __name__ == "__main__":
    main()
