"""How far estimators of the meta-gradient are from the exact one, by their number of terms.

    python benchmarks/adaptation/gradient_error.py

Truncated backpropagation and the binomial expansion (arXiv 2604.13263) against full unrolling, in
float64, over tasks of two kinds: logistic regression on handwritten digits, which is convex, so
that the paper's bound holds; and sine waves on the perceptron of MAML, at two step sizes. Takes a
minute, and writes ``docs/images/adaptation-gradient-error.png`` beside the numbers.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]

from harness import report, table  # noqa: E402
from problems import as_number, distance, learner  # noqa: E402

from surgery.train.adapt.estimators import Binomial, Truncated, Unrolled  # noqa: E402
from surgery.train.adapt.inner import Meta, Problem, Task  # noqa: E402
from surgery.train.adapt.learner import one, split  # noqa: E402
from surgery.train.adapt.rules import Shared  # noqa: E402
from surgery.train.views import canvas  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "adaptation-gradient-error.png"
CONVEX = "logistic regression on digits (convex)"
STEPS = 10
TASKS = 20
Case = tuple[Problem, Meta, list[Task]]


def main() -> None:
    torch.set_num_threads(1)
    found = {
        CONVEX: errors(*logistic()),
        "sine waves, step size 0.002": errors(*sines(0.002)),
        "sine waves, step size 0.01": errors(*sines(0.01)),
    }
    header = ["problem", "estimator", *(f"L = {n}" for n in range(STEPS))]
    rows = [
        [name, estimator, *(f"{each:.1e}" for each in means)]
        for name, by in found.items()
        for estimator, means in by.items()
    ]
    data = {
        name: {estimator: [as_number(e) for e in means] for estimator, means in by.items()}
        for name, by in found.items()
    }
    for name, by in found.items():
        for terms in range(1 if name == CONVEX else STEPS - 1, STEPS):
            assert by["binomial"][terms] < by["truncated"][terms], f"{name}, L = {terms}"
    draw(found)
    report("adaptation_gradient_error", table(header, rows), {"steps": STEPS, "errors": data})


def logistic() -> Case:
    """Ten classes from 64 pixels, 50 support and 50 query samples; steps of 0.3 / H."""
    from surgery.train.data import open_data
    from surgery.train.data.configs import DigitsData

    samples: Any = open_data(DigitsData(), seed=0).train
    images, labels = samples.images.flatten(1).double(), samples.labels
    draw = torch.Generator().manual_seed(0)

    def part() -> dict[str, Tensor]:
        chosen = torch.randperm(len(labels), generator=draw)[:50]
        return {"x": images[chosen], "y": labels[chosen]}

    def loss(values: Mapping[str, Tensor], samples: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(samples["x"], values["w"]), samples["y"])

    tasks = [Task(part(), part()) for _ in range(TASKS)]
    start = 0.1 * torch.randn(10, 64, dtype=torch.float64, generator=draw)
    # The Hessian of cross entropy is at most half the largest mean square of a direction.
    most = max(float(torch.linalg.matrix_norm(t.support["x"], 2)) ** 2 / 50 / 2 for t in tasks)
    return Problem(loss, Shared(0.3 / most), STEPS), Meta({"w": start}, {}, {}), tasks


def sines(lr: float) -> Case:
    """Ten samples each, on the perceptron 1-40-40-1 at its initial weights."""
    made, _, batches = learner(
        "sinusoid-maml", "model.dtype=float64", f"inner.steps={STEPS}", f"inner.lr={lr}"
    )
    tasks = split(batches(TASKS), torch.float64)
    return made.problem, made.meta(), [one(tasks, i) for i in range(TASKS)]


def errors(problem: Problem, meta: Meta, tasks: list[Task]) -> dict[str, list[float]]:
    """Mean relative error over the tasks, by estimator and terms."""
    exact = [Unrolled()(problem, meta, task).gradient for task in tasks]
    return {
        name: [
            statistics.mean(
                distance(kind(terms)(problem, meta, task).gradient, best)
                for task, best in zip(tasks, exact, strict=True)
            )
            for terms in range(STEPS)
        ]
        for name, kind in (("truncated", Truncated), ("binomial", Binomial))
    }


def draw(found: Mapping[str, Mapping[str, list[float]]]) -> None:
    figure = canvas.new_figure(12.5, 4.0)
    panels = figure.subplots(1, len(found))
    for axes, (name, by) in zip(panels, found.items(), strict=True):
        for color, (estimator, means) in zip(canvas.COLORS[1:], by.items(), strict=False):
            axes.plot(range(STEPS), means, marker="o", markersize=4, color=color, label=estimator)
        axes.set_yscale("log")
        axes.set_xlabel("terms L, of 10 inner steps")
        axes.set_title(name, fontsize=10)
        axes.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("relative error of the meta-gradient")
    panels[0].legend(frameon=False)
    figure.savefig(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    main()
