"""Plan and apply LoRA on models that do not fit anywhere, on the meta device.

To reach: at most 0.5 of the time of ``peft.get_peft_model(low_cpu_mem_usage=True)`` on a 7B
LLaMA, and 2 s on a 70B one.

Run: ``python benchmarks/lora_meta.py [--rounds 15]``
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from harness import as_data, interleave, report, table
from torch import nn

import surgery
from surgery import LowRank, Rule, Type

SIZES: dict[str, dict[str, Any]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
LIMIT_RATIO, LIMIT_SECONDS = 0.5, 2.0


def llama(size: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES[size]))


def ours(model: nn.Module) -> int:
    plan = surgery.plan(model, Rule(LowRank(rank=16), where=Type("Linear")))
    plan.apply()
    return len(plan.edits)


def theirs(model: nn.Module) -> int:
    from peft import LoraConfig, get_peft_model

    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    targets = sorted({name.rpartition(".")[2] for name in linear})
    get_peft_model(model, LoraConfig(r=16, target_modules=targets), low_cpu_mem_usage=True)
    return len(linear)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    model: list[nn.Module] = []

    def prepare() -> None:
        model[:] = [llama("7B")]

    assert ours(llama("7B")) == theirs(llama("7B"))
    timings = interleave(
        {"ours": lambda: ours(model[0]), "peft": lambda: theirs(model[0])},
        rounds=rounds,
        prepare=prepare,
    )
    ratio = timings.ratio("ours", "peft")
    large = []
    for _ in range(5):
        seventy = llama("70B")
        start = time.perf_counter()
        ours(seventy)
        large.append(time.perf_counter() - start)
    text = table(
        ["LoRA r=16 on every linear layer, on meta", "ours", "peft", "ratio [95%]", "limit"],
        [
            [
                "LLaMA 7B, plan + apply",
                f"{timings.median('ours'):.3f} s",
                f"{timings.median('peft'):.3f} s",
                str(ratio),
                f"{LIMIT_RATIO}",
            ],
            [
                "LLaMA 70B, plan + apply (worst of 5)",
                f"{max(large):.3f} s",
                "",
                "",
                f"{LIMIT_SECONDS:.0f} s",
            ],
        ],
    )
    data = {
        "7B": {name: timings.median(name) for name in ("ours", "peft")},
        "ratio": as_data(ratio),
        "70B_seconds": large,
        "met": {"7B": ratio.high <= LIMIT_RATIO, "70B": max(large) <= LIMIT_SECONDS},
    }
    report("lora_meta", text, data)


if __name__ == "__main__":
    main()
