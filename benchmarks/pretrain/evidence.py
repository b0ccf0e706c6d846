"""What learned residual connections do for small models, trained from scratch on the CPU.

    python benchmarks/pretrain/evidence.py                          # everything: many hours
    python benchmarks/pretrain/evidence.py --only llama --seeds 0   # a part of it
    python benchmarks/pretrain/evidence.py --page                   # write the page anew

Four models, each as it is and with four topologies, over several seeds, on the same data in the
same order. Interrupted, the same command goes on where it stopped; what is done is not done again.
Runs stay in ``runs/evidence``, numbers go to ``benchmarks/pretrain/results``, and the page
``docs/pretraining-evidence.md`` is written from those: a cell that was not measured says so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import (
    ROOT,
    Folders,
    Place,
    busy,
    draw_losses,
    machine,
    markdown,
    names_of,
    numbers,
    today,
    write_json,
)

import surgery
from surgery.errors import SurgeryError
from surgery.table import human_count
from surgery.train import apart
from surgery.train.compare import Comparison, finished, report, train_once
from surgery.train.config import PretrainConfig
from surgery.train.views import canvas, matrices, read_run

PLACE = Place.named("evidence", __file__, "pretraining-evidence.md")

#: The learning rate of the configuration times these.
GRID = (1 / 3, 1.0, 3.0)
#: Learning rates are chosen with a seed that no result comes from.
GRID_SEED = 100
BASELINE = "baseline"
EVALUATIONS = 25


@dataclass(frozen=True)
class Experiment:
    """One model on one set of data.

    Attributes:
        title: Heading on the page.
        config: A shipped configuration.
        steps: Of every run; None for those of the configuration.
    """

    title: str
    config: str
    steps: int | None = None


EXPERIMENTS = {
    "llama": Experiment("LLaMA tiny on the source of the standard library", "llama-tiny"),
    "resnet": Experiment("ResNet-56 on handwritten digits", "resnet-56-digits"),
    "mlp": Experiment("Residual MLP of 64 layers on handwritten digits", "mlp-64"),
    "dit": Experiment("DiT tiny on handwritten digits", "dit-tiny", steps=500),
}
#: Options of the pass `shortcuts`; None leaves the model as it is.
VARIANTS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "ancre": {"topology": "ancre", "normalization": "incoming"},
    "ancre-outgoing": {"topology": "ancre", "normalization": "outgoing"},
    "constant": {"topology": "ancre", "parameterization": "constant"},
    "denseformer": {"topology": "denseformer"},
    "ancre-replace": {"topology": "ancre", "scope": "residual", "mode": "replace"},
}


def main() -> int:
    args = arguments()
    failed: list[str] = []
    for name in [] if args.page else args.only:
        try:
            measure(name, args)
        except SurgeryError as error:
            # One model that fails is no reason to leave the others out.
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    place = PLACE.of(args.steps)
    write_page(place)
    print(f"written: {place.page.relative_to(ROOT)}")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=names_of(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--variants", type=names_of(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument("--steps", type=int, help="a trial of so few steps, apart from the results")
    parser.add_argument("--lr", type=float, help="this learning rate, without a grid")
    parser.add_argument(
        "--tune",
        choices=["baseline", "each"],
        default="baseline",
        help="search the grid with the baseline alone, or with every variant for itself",
    )
    parser.add_argument("--page", action="store_true", help="train nothing, write the page")
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> None:
    """Run what is missing of one experiment, and write its numbers after every run."""
    plan = Plan(name, args.steps, args.lr)
    searched_too = args.variants if args.tune == "each" else []
    for variant in dict.fromkeys([BASELINE, *searched_too]):
        plan.search(variant)
    # Seed by seed: an interrupted evening leaves whole columns, and what is compared runs close
    # together in time.
    for seed in args.seeds:
        for variant in args.variants:
            plan.train(variant, seed, plan.rate(variant))
            write_results(plan)


@dataclass
class Plan:
    """One experiment with its learning rates.

    Attributes:
        name: A key of ``EXPERIMENTS``.
        steps: Of every run; None for those of the configuration.
        given: A learning rate that no grid is searched for.
        grids: Variant → its search; those that have none take the baseline's rate.
    """

    name: str
    steps: int | None
    given: float | None
    grids: dict[str, dict[str, Any]] = field(default_factory=dict)

    def search(self, variant: str) -> None:
        """Find the learning rate of the grid with which a variant ends lowest."""
        if self.given is not None:
            return
        base = base_rate(self.name)
        tried: dict[float, float | None] = {}
        for factor in GRID:
            rate = float(f"{factor * base:.2g}")
            last = float(read_run(self.train(variant, GRID_SEED, rate)).evaluation.values[-1])
            tried[rate] = last if math.isfinite(last) else None
        ended = {rate: loss for rate, loss in tried.items() if loss is not None}
        if not ended:
            raise SurgeryError(f"{self.name}: {variant} diverged with every rate of the grid")
        self.grids[variant] = {
            "chosen": min(ended, key=lambda rate: ended[rate]),
            "seed": GRID_SEED,
            "tried": {f"{rate:g}": loss for rate, loss in tried.items()},
        }

    def rate(self, variant: str) -> float:
        """The learning rate that a variant is trained with."""
        if self.given is not None:
            return self.given
        return self.grids.get(variant, self.grids[BASELINE])["chosen"]

    def folder(self, variant: str, seed: int, rate: float) -> Path:
        """Of one run."""
        length = "" if self.steps is None else f"-{self.steps}-steps"
        return PLACE.runs / f"{self.name}{length}" / variant / f"lr-{rate:g}" / f"seed-{seed}"

    def train(self, variant: str, seed: int, rate: float) -> Path:
        """Train one run unless it is done, and return its folder."""
        config = configuration(self.name, variant, seed, rate, self.steps)
        folder = self.folder(variant, seed, rate)
        if not finished(config, folder):
            print(f"{self.name}: {variant}, seed {seed}, learning rate {rate:g}", flush=True)
            train_once(config, folder, apart.in_a_process)
        return folder

    def done(self) -> dict[str, dict[int, Path]]:
        """Variant → seed → folder, of the runs at the chosen rates that are finished."""
        found: dict[str, dict[int, Path]] = {}
        for variant in VARIANTS:
            rate = self.rate(variant)
            for folder in sorted(self.folder(variant, 0, rate).parent.glob("seed-*")):
                seed = int(folder.name.removeprefix("seed-"))
                config = configuration(self.name, variant, seed, rate, self.steps)
                if seed != GRID_SEED and finished(config, folder):
                    found.setdefault(variant, {})[seed] = folder
        return found


def configuration(
    name: str, variant: str, seed: int, rate: float, steps: int | None
) -> PretrainConfig:
    """A shipped configuration with one variant's rules, without what only costs time."""
    shipped = ROOT / "configs" / "pretrain" / f"{EXPERIMENTS[name].config}.yaml"
    data = PretrainConfig.load(shipped).dump()
    options = VARIANTS[variant]
    count = steps or EXPERIMENTS[name].steps or data["train"]["steps"]
    data["name"], data["seed"] = f"{name}-{variant}", seed
    data["rules"] = None if options is None else recipe(variant, options)
    data["objective"].pop("sample", None)
    data["optim"]["lr"] = rate
    data["train"]["steps"] = count
    data["schedule"]["warmup"] = min(data["schedule"]["warmup"], count // 10)
    every = max(1, count // EVALUATIONS)
    data["evaluate"]["every"] = every
    data["checkpoint"] = {"every": max(1, count // 4), "keep": 1}
    data["log"] = {"every": max(1, count // 100), "tensorboard": False, "matrices": every}
    return PretrainConfig.parse(data)


def recipe(variant: str, options: Mapping[str, Any]) -> dict[str, Any]:
    rule = {"id": "shortcuts", "pass": "shortcuts", "where": {"stack": "all"}, "with": options}
    return {"version": 1, "recipe": variant, "seed": 0, "rules": [rule]}


def base_rate(name: str) -> float:
    shipped = ROOT / "configs" / "pretrain" / f"{EXPERIMENTS[name].config}.yaml"
    return PretrainConfig.load(shipped).optim.lr


def write_results(plan: Plan) -> None:
    """The numbers of everything that is finished, as JSON, and the pictures of the page."""
    folders = plan.done()
    if BASELINE not in folders:
        return
    found = report(folders, PLACE.runs / plan.name)
    config = configuration(plan.name, BASELINE, 0, plan.rate(BASELINE), plan.steps)
    data = {
        "machine": machine(),
        "date": today(),
        "config": EXPERIMENTS[plan.name].config,
        "parameters": parameters(config),
        "seen": seen(config),
        "rates": {variant: plan.rate(variant) for variant in VARIANTS},
        "grids": plan.grids,
        "comparison": {**found.to_dict(), "out": None},
        "table": table(found),
    }
    place = PLACE.of(plan.steps)
    write_json(place.results / f"evidence-{plan.name}.json", data)
    draw(plan.name, folders, place.images)


def draw(name: str, folders: Folders, images: Path) -> None:
    """Loss curves of all runs, and what ancre learned with the first seed."""
    draw_losses(folders, images / f"evidence-{name}-losses.png")
    if "ancre" in folders:
        first = read_run(next(iter(folders["ancre"].values())))
        if first.frames:
            picture = matrices.at_the_end(first.frames)
            canvas.save(picture, images / f"evidence-{name}-matrices.png")


def parameters(config: PretrainConfig) -> int:
    model = surgery.load(config.model.source, config=config.model.config, device="meta")
    return sum(parameter.numel() for parameter in model.parameters())


def seen(config: PretrainConfig) -> str:
    """What every run sees."""
    samples = config.train.steps * config.train.batch
    data = config.data
    if data.kind == "text":
        return f"{human_count(samples * data.length)} tokens in samples of {data.length}"
    return f"{human_count(samples)} images"


def table(found: Comparison) -> list[dict[str, str]]:
    """One line per variant that was run, as text."""
    return [
        {
            "name": row.name,
            "seeds": str(len(row.metrics["loss"].values) if "loss" in row.metrics else 0),
            "loss": str(row.metrics.get("loss", "not finite")),
            "accuracy": str(row.metrics.get("accuracy", "-")),
            "perplexity": str(row.metrics.get("perplexity", "-")),
            "difference": "-" if row.difference is None else str(row.difference),
            "saving": "-" if row.saving is None else str(row.saving),
            "time": "-" if row.time is None else str(row.time),
            "memory": "-" if row.space is None else str(row.space),
            "lost": ", ".join(map(str, row.lost)),
        }
        for row in found.rows
    ]


def write_page(place: Place) -> None:
    """Write the page from the numbers that there are."""
    parts = [HEAD.format(grid=", ".join(f"{f:.2g}" for f in GRID))]
    for name, experiment in EXPERIMENTS.items():
        parts.append(f"## {experiment.title}\n")
        path = place.results / f"evidence-{name}.json"
        if path.is_file():
            parts += section(name, json.loads(path.read_text()), place.images)
        else:
            parts.append(f"Not run yet: `python benchmarks/pretrain/evidence.py --only {name}`.\n")
    place.page.parent.mkdir(parents=True, exist_ok=True)
    place.page.write_text("\n".join(parts))


def section(name: str, data: Mapping[str, Any], images: Path) -> Iterator[str]:
    """One experiment on the page."""
    steps, where = data["comparison"]["steps"], data["machine"]
    yield (
        f"`configs/pretrain/{data['config']}.yaml`, {human_count(data['parameters'])} parameters. "
        f"{steps} steps, {data['seen']} for every run. {rate_told(data)} Measured {data['date']} "
        f"on {where['cores']} CPU cores with torch {where['torch']}.\n"
    )
    yield measured_table(data["table"]) + "\n"
    yield from missing(name, data["table"])
    yield per_seed(data["comparison"])
    yield from busy(data["comparison"])
    for kind, caption in (("losses", "Loss curves"), ("matrices", "Coefficients of ancre, seed 0")):
        if (images / f"evidence-{name}-{kind}.png").is_file():
            yield f"![{caption}.](images/evidence-{name}-{kind}.png)\n"


def rate_told(data: Mapping[str, Any]) -> str:
    """The learning rates, and how they were found."""
    if not data["grids"]:
        return f"Learning rate {data['rates'][BASELINE]:g}, given by hand."
    return " ".join(
        searched(variant, grid, alone=len(data["grids"]) == 1)
        for variant, grid in data["grids"].items()
    )


def searched(variant: str, grid: Mapping[str, Any], *, alone: bool) -> str:
    tried = grid["tried"]
    listed = ", ".join(
        f"{rate}: {'diverged' if loss is None else f'{loss:.4g}'}" for rate, loss in tried.items()
    )
    ends = [float(rate) for rate in tried]
    edge = ", at the edge of the grid, so that a better one may lie outside"
    return (
        f"Learning rate {'of all variants' if alone else f'of `{variant}`'} {grid['chosen']:g}"
        f"{edge if grid['chosen'] in {min(ends), max(ends)} else ''}: the final loss of "
        f"`{variant}` by rate was {listed} (seed {grid['seed']})."
    )


COLUMNS = {
    "name": "variant",
    "seeds": "seeds",
    "loss": "validation loss",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "difference": "loss less the baseline's [95%]",
    "saving": "steps to the baseline's final loss",
    "time": "time per step / baseline",
    "memory": "memory / baseline",
}


def measured_table(rows: Sequence[Mapping[str, str]]) -> str:
    """One line per variant, without the columns that nothing was measured of."""
    shown = {key: head for key, head in COLUMNS.items() if any(row[key] != "-" for row in rows)}
    return markdown(shown, rows, list(VARIANTS))


def missing(name: str, rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """What has to be said about single runs."""
    for row in rows:
        if row["lost"]:
            yield f"`{row['name']}` has no finite loss at the end with seed {row['lost']}.\n"
    if any(int(row["seeds"]) < 3 for row in rows):
        yield (
            "Fewer than three seeds were run of some variants: "
            f"`python benchmarks/pretrain/evidence.py --only {name}` goes on.\n"
        )


def per_seed(comparison: Mapping[str, Any]) -> str:
    """Every seed's loss and steps saved, so that nobody has to trust a mean."""
    lines = ["Seed by seed, validation loss and steps saved:\n"]
    for row in comparison["rows"]:
        values = row["metrics"].get("loss", {"values": {}})["values"]
        saving = row["saving"] or {"runs": []}
        saved = {str(run["seed"]): run["saved"] for run in saving["runs"]}
        told = ", ".join(f"{loss:.4g}{saved_told(saved, seed)}" for seed, loss in values.items())
        lines.append(f"- `{row['name']}`: {told or 'no finite loss'}")
    return "\n".join(lines) + "\n"


def saved_told(saved: Mapping[str, float | None], seed: str) -> str:
    if seed not in saved:
        return ""
    part = saved[seed]
    return " (not reached)" if part is None else f" ({100 * part:.0f}%)"


HEAD = """# What learned residual connections do for small models

Written by `python benchmarks/pretrain/evidence.py` from what it measured; nothing here was edited
by hand. Small models, little data, a CPU: this says how the method behaves at this size, and no
more. The authors' results (arXiv 2602.09009) are for models of 60 million parameters and above.

- **Variants.** `baseline` is the model as it is. `ancre` and `ancre-outgoing` learn their
  coefficients, `constant` is `ancre` with coefficients that stay equal, `denseformer` averages over
  the depth (arXiv 2402.02622). `ancre` as its authors define it adds the learned sum to blocks that
  keep their own shortcuts, so that states grow from block to block unless the model normalises what
  enters a block; `ancre-replace`, of our own, puts the learned sum in place of the shortcuts.
  See [residual connections](shortcuts.md).
- **Budget.** All variants of a model see the same samples in the same order for the same number of
  steps. Within a seed they differ in their residual connections only.
- **Learning rate.** From a small grid, the configuration's own rate times {grid}, searched with a
  seed that no result comes from. Unless a section says otherwise it is searched with the baseline
  alone, and the rate at which that ends lowest is used for all variants: this favours the baseline.
- **Difference.** Validation loss less the baseline's, seed by seed, with the 95% interval of the
  mean by Student's t. Where the interval holds zero, no difference was shown.
- **Steps saved.** The first step at which a run's validation loss, linear between evaluations,
  reaches the baseline's final one with the same seed. A mean over seeds is given only where every
  seed reached it. Learning rates are scheduled over the whole run: a shorter run of the same
  configuration would not end there.
- **Time** is the median over the steps of a run, **memory** the peak of its process less what its
  libraries take; both relative to the baseline with the same seed. Runs were made one after the
  other on a machine that may have had other work; `benchmarks/pretrain/overhead.py` times `ancre`
  in turns with the baseline, inside the trainer ([benchmarks](benchmarks.md)).
"""


if __name__ == "__main__":
    sys.exit(main())
