"""Plan, apply and verify the largest open models on the meta device, where nothing is allocated.

Rewires the residual connections and puts LoRA on every linear layer of configurations of the sizes
of LLaMA 3.1 405B and DeepSeek-V3. To reach: under 60 s each on two cores, building included.

Run: ``python benchmarks/meta.py [--profile] [--only NAME]``
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import transformers.modeling_utils  # noqa: F401 - its import is not what is measured
from harness import report, table

import surgery
from surgery import LowRank, Rule, Shortcuts, Type

#: Name → spec, and the fields of its configuration that differ from the library's defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaMA 405B": (
        "transformers:LlamaForCausalLM",
        {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    "DeepSeek-V3": ("transformers:DeepseekV3ForCausalLM", {}),
}
LIMIT_SECONDS = 60.0
STAGES = ("build", "plan", "apply", "verify")

RULES = [
    Rule(Shortcuts(topology="ancre", init="identity"), id="shortcuts"),
    Rule(LowRank(rank=16), where=Type("Linear"), id="adapters"),
]


class Clock:
    """Seconds of each stage, by the wall and by the CPU."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time a block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = time.perf_counter() - wall
        self.cpu[name] = time.process_time() - cpu


def measure(spec: str, config: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each stage, and what verify says."""
    clock = Clock()
    with clock.stage("build"):
        model = surgery.load(spec, config=config, device="meta", dtype="bfloat16")
    with clock.stage("plan"):
        plan = surgery.plan(model, RULES)
    with clock.stage("apply"):
        plan.apply()
    with clock.stage("verify"):
        verified = surgery.verify(model)
    verified.check()
    return {
        "parameters": plan.totals.parameters,
        "added": plan.totals.added,
        "edits": len(plan.edits),
        "seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "verify": verified.to_dict(),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", choices=list(MODELS))
    arguments = parser.parse_args()
    chosen = {name: MODELS[name] for name in MODELS if arguments.only in (None, name)}
    if arguments.profile:
        for name, (spec, config) in chosen.items():
            profile = cProfile.Profile()
            profile.runcall(measure, spec, config)
            print(name)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(50)
        return
    torch.set_num_threads(2)
    found = {name: measure(spec, config) for name, (spec, config) in chosen.items()}
    report("meta", _table(found), {"models": found, "met": _met(found)})


def _met(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, bool]]:
    """By either clock: the wall's is that of whatever else the machine does too."""
    clocks = ("seconds", "cpu_seconds")
    return {
        name: {clock: sum(one[clock].values()) <= LIMIT_SECONDS for clock in clocks}
        for name, one in found.items()
    }


def _table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{one['parameters'] / 1e9:.0f} G",
            str(one["edits"]),
            *(f"{one['seconds'][stage]:.1f} s" for stage in STAGES),
            f"{sum(one['seconds'].values()):.1f} s",
            f"{sum(one['cpu_seconds'].values()):.1f} s",
            f"{one['peak_gb']:.1f} GB",
        ]
        for name, one in found.items()
    ]
    header = ["on meta", "parameters", "edits", *STAGES, "all", "CPU time", "peak memory"]
    return table(header, rows)


if __name__ == "__main__":
    main()
