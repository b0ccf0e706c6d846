"""Matrix factorisation: loss against step for LoRA, RefLoRA and ScaLoRA, after RefLoRA's paper.

    python benchmarks/adapters/factorisation.py            # measure, draw, write (a few minutes)
    python benchmarks/adapters/factorisation.py --draw     # draw what was measured before

The loss is ``½ ‖W + B A - T‖²`` for a fixed W and a target T, which is what fine-tuning one linear
layer on whitened inputs comes down to. Two targets: one that differs from W by a matrix of the
adapters' rank with singular values from 1 to 1/100, which every method can reach, and one that
differs by a matrix of full rank, which an adapter of rank r cannot. Nothing is special to the
benchmark: the layer is adapted by a rule, ``surgery.adapters.prepare`` attaches the method's part
to torch's SGD, and gradients are autograd's.

The settings of the paper's own figure (arXiv 2505.18877) were not at hand; these are ours. Each
method gets the step size from a grid at which its final loss is lowest, for a seed that no curve
is drawn from.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import LowRank, Rule, adapters

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "factorisation.json"
IMAGE = ROOT / "docs" / "images" / "factorisation.png"

ROWS, COLUMNS, RANK, STEPS = 64, 48, 8, 300
#: Step sizes; then the best of them is halved and doubled.
GRID = [4.0**exponent for exponent in range(-5, 2)]
GRID_SEED, SEEDS = 100, range(5)
#: Plain steps before RefLoRA acts: it needs a B that is not zero.
WARMUP = 10


@dataclass(frozen=True)
class Method:
    """One curve.

    Attributes:
        label: In the legend.
        method: Of the rule.
        options: Of the method.
        drawn: The targets for which it is drawn; the table has all.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    drawn: tuple[str, ...] = ("rank", "full")


METHODS = (
    Method("LoRA", "lora"),
    Method("RefLoRA-S", "reflora-s", {"warmup": WARMUP}),
    Method("RefLoRA", "reflora", {"warmup": WARMUP}),
    # The loss is quadratic with curvature 1.
    Method("ScaLoRA, L = 1", "scalora", {"lipschitz": 1.0}, drawn=("full",)),
)
TARGETS = {
    "rank": f"T - W of rank {RANK}, condition number 100",
    "full": "T - W of full rank",
}


def difference(target: str, draw: torch.Generator) -> Tensor:
    """T - W, with a largest singular value of 1."""
    shape = (ROWS, COLUMNS)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=draw, dtype=torch.float64), False)
    rank = RANK if target == "rank" else COLUMNS
    values = torch.logspace(0, -2, rank, dtype=torch.float64)
    return U[:, :rank] * values @ Vh[:rank]


def unreachable(target: str) -> float:
    """The loss of the best matrix of the adapters' rank: what LoRA cannot go below."""
    if target == "rank":
        return 0.0
    values = torch.logspace(0, -2, COLUMNS, dtype=torch.float64)
    return 0.5 * values[RANK:].square().sum().item()


def run(method: Method, target: str, lr: float, seed: int) -> tuple[list[float], int]:
    """The loss before every step and after the last, and the rank of the sum of all steps."""
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(ROWS, COLUMNS, generator=draw) / math.sqrt(COLUMNS))
    start = layer.weight.detach().clone()
    goal = start + difference(target, draw)
    recipe = surgery.Recipe(
        rules=[Rule(LowRank(method=method.method, rank=RANK, options=method.options))], seed=seed
    )
    model = nn.Sequential(layer)
    surgery.apply(model, recipe)
    optimizer = torch.optim.SGD(adapters.parameters(model), lr=lr)
    adapters.prepare(model, optimizer)
    identity = torch.eye(COLUMNS, dtype=torch.float64)
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = 0.5 * (model(identity) - goal.mT).square().sum()
        losses.append(loss.item())
        if not losses[-1] < 1e6:
            return losses, 0
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        whole = model(identity).mT
    losses.append(0.5 * (whole - goal).square().sum().item())
    values = torch.linalg.svdvals(whole - start)
    return losses, int((values > 1e-3 * values[0]).sum())


def step_size(method: Method, target: str) -> float:
    """That of the grid at which the final loss is lowest; nothing else comes from this seed."""
    finals: dict[float, float] = {}

    def lowest(sizes: Iterable[float]) -> float:
        for lr in sizes:
            loss = run(method, target, lr, GRID_SEED)[0][-1]
            finals[lr] = loss if math.isfinite(loss) else math.inf
        return min(finals, key=finals.__getitem__)

    best = lowest(GRID)
    return lowest((best / 2, best * 2))


def measure() -> dict[str, Any]:
    began = time.process_time()
    curves: dict[str, Any] = {}
    for target in TARGETS:
        for method in METHODS:
            best = step_size(method, target)
            runs = [run(method, target, best, seed) for seed in SEEDS]
            curves.setdefault(target, {})[method.label] = {
                "lr": best,
                "losses": [[float(f"{loss:.4g}") for loss in losses] for losses, _ in runs],
                "ranks": [rank for _, rank in runs],
            }
            last = sorted(losses[-1] for losses, _ in runs)
            print(f"{target:5} {method.label:15} lr {best:<9g} final {last[0]:.2e}..{last[-1]:.2e}")
    return {
        "setting": {
            "rows": ROWS,
            "columns": COLUMNS,
            "rank": RANK,
            "steps": STEPS,
            "grid": GRID,
            "seeds": list(SEEDS),
            "warmup of RefLoRA": WARMUP,
        },
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU seconds": round(time.process_time() - began, 1),
        "unreachable": {target: unreachable(target) for target in TARGETS},
        "curves": curves,
    }


def draw(found: Mapping[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    corners = ("upper right", "lower left")
    for axes, corner, (target, title) in zip(panels, corners, TARGETS.items(), strict=True):
        for number, method in enumerate(METHODS):
            if target not in method.drawn:
                continue
            curve = found["curves"][target][method.label]
            losses = torch.tensor(curve["losses"], dtype=torch.float64)
            middle, steps = losses.median(0).values, range(losses.shape[1])
            color = f"C{number}"
            axes.plot(
                steps, middle, color=color, label=f"{method.label} (step size {curve['lr']:.2g})"
            )
            axes.fill_between(
                steps, losses.amin(0), losses.amax(0), color=color, alpha=0.2, linewidth=0
            )
        least = found["unreachable"][target]
        if least:
            axes.axhline(least, color="0.4", linestyle="--", linewidth=1)
            axes.annotate(
                f"best change of rank {RANK}",
                (0.99, least),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color="0.4",
            )
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(loc=corner)
    panels[0].set_ylabel("½ ‖W + B A - T‖²")
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=110)


def table(found: Mapping[str, Any]) -> str:
    """Markdown: the final losses."""
    lines = [
        "| target | method | step size | final loss, median [least, largest] | rank reached |",
        "|---|---|---|---|---|",
    ]
    for target, title in TARGETS.items():
        for label, curve in found["curves"][target].items():
            last = torch.tensor([losses[-1] for losses in curve["losses"]], dtype=torch.float64)
            least, middle, most = last.min(), last.median(), last.max()
            ranks = sorted(curve["ranks"])
            span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
            lines.append(
                f"| {title} | {label} | {curve['lr']:.2g} | "
                f"{middle:.2g} [{least:.2g}, {most:.2g}] | {span} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="draw what was measured before")
    if parser.parse_args().draw:
        found = json.loads(RESULTS.read_text())
    else:
        found = measure()
        RESULTS.write_text(json.dumps(found) + "\n")
    draw(found)
    print(table(found))


if __name__ == "__main__":
    main()
