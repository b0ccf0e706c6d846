"""Run folders that no training made, of every shape that there is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def softmax_matrix(sites: int, progress: float, seed: int = 0) -> Tensor:
    """(K, K): uniform rows at progress 0, a few strong entries per row at 1."""
    draw = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(sites, sites, generator=draw, dtype=torch.float64)
    above = torch.ones(sites, sites).triu(1).bool()
    return (progress * scores).masked_fill(above, -torch.inf).softmax(-1).float()


def signed_matrix(sites: int, progress: float, seed: int = 0) -> Tensor:
    """(K, K): zero at progress 0, of both signs later."""
    draw = torch.Generator().manual_seed(seed)
    return progress * 0.3 * torch.randn(sites, sites, generator=draw).tril()


def config(name: str, seed: int, steps: int, rules: str | None) -> str:
    """A resolved configuration, as far as pictures need it."""
    passes = {"ancre": "shortcuts", "lora": "lowrank"}
    data: dict[str, Any] = {
        "version": 1,
        "name": name,
        "seed": seed,
        "rules": None if rules is None else {"recipe": rules, "rules": [{"pass": passes[rules]}]},
        "train": {"steps": steps, "batch": 4},
        "log": {"matrices": 50},
    }
    return json.dumps(data)  # JSON is YAML


def write_log(
    path: Path, *, steps: int, floor: float, every: int = 10, evaluate: int = 50, seed: int = 0
) -> None:
    """Losses that fall from 5 towards ``floor``, the training one with noise."""
    draw = torch.Generator().manual_seed(seed)
    lines: list[dict[str, Any]] = []
    for step in range(0, steps + 1, every):
        loss = floor + (5 - floor) * 2.718 ** (-4 * step / steps)
        if step:
            noise = 0.15 * torch.randn((), generator=draw).item()
            lines.append(
                {
                    "kind": "step", "step": step, "loss": loss + noise, "lr": 1e-3,
                    "grad_norm": 1.0, "tokens": step * 64, "seconds": 0.1 * step,
                    "per_second": 640.0,
                }
            )  # fmt: skip
        if step % evaluate == 0:
            lines.append({"kind": "evaluation", "step": step, "loss": loss, "perplexity": 2**loss})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(
    folder: Path,
    stacks: Mapping[str, int],
    *,
    name: str = "ancre",
    seed: int = 0,
    steps: int = 500,
    floor: float = 1.5,
    every: int = 50,
    matrix: Any = softmax_matrix,
    rules: str | None = "ancre",
) -> Path:
    """A finished run of a model with these stacks, name → K."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config(name, seed, steps, rules))
    write_log(folder / "log.jsonl", steps=steps, floor=floor, seed=seed)
    if stacks:
        (folder / "matrices").mkdir()
    for step in range(0, steps + 1, every):
        found = {
            stack: matrix(sites, step / steps, seed + at)
            for at, (stack, sites) in enumerate(stacks.items())
        }
        if found:
            save_file(found, folder / "matrices" / f"{step:06d}.safetensors", {"kind": "matrices"})
    return folder
