"""CPU seconds of one scaling by ScaLoRA, for the linear layers of a LLaMA of 8 layers, width 512.

    OMP_NUM_THREADS=1 python benchmarks/scalora_step.py

Processor time, which other work on the machine alters little. A training step of LoRA on the same
model, 8 x 256 tokens, is measured by ``benchmarks/reflora_step.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from surgery.optim import Factors
from surgery.optim.scalora import ScaLoRA

RANK, LAYERS, WIDTH, HIDDEN = 16, 8, 512, 1376
SHAPES = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN)] * 2 + [(HIDDEN, WIDTH)]
REPEATS = 7


def adapter(name: str, columns: int, rows: int) -> Factors:
    weight = torch.randn(rows, columns) / columns**0.5
    A = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
    B = nn.Parameter(torch.randn(rows, RANK) / 10)
    G = torch.randn(rows, columns) / 1000
    A.grad, B.grad = B.detach().T @ G, G @ A.detach().T

    def fold(change: Tensor) -> Tensor:
        weight.add_(change)
        return torch.zeros_like(change)

    return Factors(name, A, B, 1.0, fold, weight.dtype)


def seconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    torch.manual_seed(0)
    shapes = SHAPES * LAYERS
    factors = [adapter(str(i), columns, rows) for i, (columns, rows) in enumerate(shapes)]
    optimizer = torch.optim.AdamW([p for each in factors for p in (each.A, each.B)], lr=1e-3)
    rule = ScaLoRA(factors)
    rule.before(optimizer)  # finds L
    found = seconds(lambda: rule.before(optimizer))
    kinds = [kind for own in rule.kinds.values() for kind in own]
    print(f"{len(factors)} adapters of rank {RANK}: {1e3 * found:.0f} ms of CPU per scaling")
    print(", ".join(f"{kind} {kinds.count(kind)}" for kind in sorted(set(kinds))))


if __name__ == "__main__":
    main()
