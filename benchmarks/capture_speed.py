"""Seconds to capture a model and rewire its residual connections.

`surgery.plan(...)` traces the model, finds its stacks and reads the code that goes through them;
`.apply()` rewrites that code and adds the coefficients. Each round has a model of its own, since a
trace and the rewritten classes are kept. The first round of a process pays for imports; its
seconds are in a column of their own.

CPU seconds are beside wall seconds: on a machine with other work the wall waits, the CPU does not.

To reach: 3 s of wall time on two cores for each row.

Run: ``python benchmarks/capture_speed.py [--rounds 5] [--profile]``
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import report, table
from torch import nn

import surgery
from surgery import Rule, Shortcuts

LIMIT = 3.0


@dataclass(frozen=True)
class Round:
    """Seconds of one plan and apply."""

    plan: float
    apply: float
    cpu: float

    @property
    def wall(self) -> float:
        """Of both together."""
        return self.plan + self.apply


def vit_b() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224")


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=4096, num_hidden_layers=32))


MODELS = {"ViT-B/16 (12 blocks)": vit_b, "LLaMA, 32 layers, meta": llama}
RULES = {
    "block": Rule(Shortcuts(scope="block")),
    "residual": Rule(Shortcuts(scope="residual", init="identity")),
}


def rewire(model: nn.Module, rule: Rule) -> Round:
    cpu, start = time.process_time(), time.perf_counter()
    plan = surgery.plan(model, rule)
    planned = time.perf_counter()
    plan.apply()
    done = time.perf_counter()
    return Round(planned - start, done - planned, time.process_time() - cpu)


def hot_spots(make: Callable[[], nn.Module], rule: Rule) -> None:
    """Print where the time of one plan goes."""
    model = make()
    with cProfile.Profile() as profile:
        surgery.plan(model, rule).apply()
    pstats.Stats(profile).sort_stats("tottime").print_stats(15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print hot spots instead")
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows, data = [], []
    for name, make in MODELS.items():
        for scope, rule in RULES.items():
            if options.profile:
                hot_spots(make, rule)
                continue
            first, *rounds = [rewire(make(), rule) for _ in range(options.rounds + 1)]
            row = _medians(rounds)
            rows.append(
                [
                    name,
                    scope,
                    f"{first.wall:.2f} s",
                    f"{row['plan']:.2f} s",
                    f"{row['apply']:.3f} s",
                    f"{row['wall']:.2f} s",
                    f"{row['cpu']:.2f} s",
                ]
            )
            print(rows[-1], flush=True)
            met = row["wall"] <= LIMIT
            data.append({"model": name, "scope": scope, "first": first.wall, **row, "met": met})
    if options.profile:
        return
    header = ["model", "scope", "first", "plan", "apply", f"both (limit {LIMIT:g} s)", "CPU"]
    load = os.getloadavg()[1]
    text = f"{table(header, rows)}\n\nload of the machine while this ran: {load:.1f}"
    report("capture_speed", text, {"rows": data, "load": load})


def _medians(rounds: list[Round]) -> dict[str, float]:
    names = ("plan", "apply", "wall", "cpu")
    return {
        name: round(statistics.median(getattr(each, name) for each in rounds), 4) for name in names
    }


if __name__ == "__main__":
    main()
