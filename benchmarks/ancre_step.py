"""A training step with learned shortcuts against the unmodified model: time and peak memory.

Forward, backward and the step of AdamW. `uniform` is the start of ANCRe's authors, `identity` the
one for pretrained models; what they cost is the same sum of K (K + 1) / 2 states. Peak memory is
what torch's allocator has handed out at most during a step, weights and optimizer included, from
the events of the profiler on the CPU and from the allocator's own statistics on CUDA.

The ratio of CPU seconds is beside that of wall seconds: where other jobs share the machine, the
wall measures those too. Set OMP_WAIT_POLICY=passive there: threads that spin while they wait
would count as work. On an idle machine leave it: to wake a thread for each small sum costs more.

To reach on the CPU: 1.03 times the unmodified model's seconds, 1.02 times its peak. With `--cuda`,
the paper's LLaMA of 350M in bfloat16, eager and compiled, beside the floor that mixing has there:
(2R + 5K) states through the memory at the bandwidth of a copy, R = K (K + 1) / 2.

Run: ``python benchmarks/ancre_step.py [--rounds 20] [--threads 2] [--cuda]``
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from harness import Timings, as_data, interleave, report, table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import surgery
from surgery import Rule, Shortcuts

TIME_LIMIT, MEMORY_LIMIT = 1.03, 1.02
WARMUP = 2
RULES = {
    "uniform": Rule(Shortcuts(init="uniform")),
    "identity": Rule(Shortcuts(init="identity")),
}
NO_GPU = "not measured: no GPU was lent"
Call = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Case:
    """A model with one batch.

    Attributes:
        model: Unmodified.
        loss: Forward of a model like it, to a scalar.
        states: Number of blocks, K.
        bytes: Size of one state.
    """

    model: nn.Module
    loss: Call
    states: int
    bytes: int


def vit_s() -> Case:
    import timm
    from torch.nn.functional import cross_entropy

    images, labels = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))
    model = timm.create_model("vit_small_patch16_224")
    return Case(model, lambda m: cross_entropy(m(images), labels), 12, 8 * 197 * 384 * 4)


def llama_8() -> Case:
    config = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    return llama(config | {"num_attention_heads": 8}, torch.float32, "cpu", 8)


def llama_350m() -> Case:
    config = {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 24}
    return llama(config | {"num_attention_heads": 16}, torch.bfloat16, "cuda", 64)


def llama(config: Mapping[str, int], dtype: torch.dtype, device: str, batch: int) -> Case:
    """A LLaMA with sequences of 256 tokens, as in the paper's runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(vocab_size=32000, use_cache=False, **config)  # type: ignore[arg-type]
    model: Any = LlamaForCausalLM(settings)
    model = model.to(device, dtype)
    ids = torch.randint(32000, (batch, 256), device=device)
    size = batch * 256 * config["hidden_size"] * dtype.itemsize
    return Case(model, lambda m: m(ids, labels=ids).loss, config["num_hidden_layers"], size)


CASES = {
    "ViT-S/16 (12 blocks, batch 8)": vit_s,
    "LLaMA (8 layers, width 512, 8 x 256 tokens)": llama_8,
}


class Step:
    """A training step of one model.

    Args:
        model: Trained in place.
        loss: Its forward.
        called: What is called for it, such as its compiled form.

    Attributes:
        cpu: CPU seconds of every step so far.
    """

    def __init__(self, model: nn.Module, loss: Call, called: Any = None) -> None:
        groups = surgery.parameter_groups(model, weight_decay=0.0)
        self._optimizer = torch.optim.AdamW(groups, lr=1e-5)
        self._called = model if called is None else called
        self._loss = loss
        self.cpu: list[float] = []

    def __call__(self) -> None:
        """Forward, backward, update."""
        start = time.process_time()
        self._loss(self._called).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.cpu.append(time.process_time() - start)

    @property
    def state_bytes(self) -> int:
        """What stays allocated between two steps: weights, and moments of the optimizer."""
        moments = [
            tensor
            for state in self._optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, Tensor)
        ]
        weights = [p for group in self._optimizer.param_groups for p in group["params"]]
        return sum(tensor.numel() * tensor.itemsize for tensor in (*weights, *moments))


def rewired(case: Case, rule: Rule) -> nn.Module:
    """A copy of the model with shortcuts."""
    return surgery.apply(copy.deepcopy(case.model), rule)


def cpu_peak(step: Step) -> int:
    """Bytes that are allocated at most during a step, from the allocations as they happen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    size = most = 0
    for event in _allocations(profiler):
        size += event
        most = max(most, size)
    return step.state_bytes + most


def _allocations(profiler: profile) -> list[int]:
    """Bytes taken (positive) and given back (negative) on the CPU, in order of time."""
    results: Any = profiler.profiler
    found = [
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return [size for _, size in sorted(found, key=lambda pair: pair[0])]


def on_cpu(name: str, rounds: int) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Both starts against the unmodified model."""
    torch.manual_seed(0)
    case = CASES[name]()
    models = {"base": case.model.train()}
    models |= {start: rewired(case, rule).train() for start, rule in RULES.items()}
    steps = {side: Step(model, case.loss) for side, model in models.items()}
    timings = interleave(steps, rounds=rounds, warmup=WARMUP)
    cpu = Timings({side: step.cpu[WARMUP:] for side, step in steps.items()})
    peaks = {side: cpu_peak(step) for side, step in steps.items()}
    rows, data = [], []
    for start in RULES:
        ratio, memory = timings.ratio(start, "base"), peaks[start] / peaks["base"]
        seconds = f"{timings.median('base') * 1e3:.0f} ms"
        ours = f"{timings.median(start) * 1e3:.0f} ms"
        work = cpu.ratio(start, "base")
        peak = f"{peaks['base'] / 2**20:.0f} MiB"
        times = [seconds, ours, str(ratio), str(work)]
        rows.append([name, start, *times, peak, f"{memory:.4f}"])
        data.append(
            {
                "model": name,
                "init": start,
                "seconds": {side: timings.median(side) for side in ("base", start)},
                "time ratio": as_data(ratio),
                "CPU ratio": as_data(work),
                "peak bytes": {side: peaks[side] for side in ("base", start)},
                "memory ratio": round(memory, 5),
                "met": ratio.median <= TIME_LIMIT and memory <= MEMORY_LIMIT,
            }
        )
        print(rows[-1], flush=True)
    return rows, data


def on_cuda(mode: str, rounds: int) -> tuple[list[str], dict[str, Any]]:
    """The paper's 350M with the authors' start, in bfloat16."""
    torch.manual_seed(0)
    case = llama_350m()
    models = {"base": case.model.train(), "uniform": rewired(case, RULES["uniform"]).train()}
    compiled = mode == "compiled"
    called = {s: torch.compile(m) if compiled else m for s, m in models.items()}
    steps = {side: Step(models[side], case.loss, called[side]) for side in models}

    def finished(step: Step) -> None:
        step()
        torch.cuda.synchronize()

    cases = {side: (lambda s=step: finished(s)) for side, step in steps.items()}
    timings = interleave(cases, rounds=rounds, warmup=5, prepare=torch.cuda.synchronize)
    peaks = {side: cuda_peak(step) for side, step in steps.items()}
    ratio, memory = timings.ratio("uniform", "base"), peaks["uniform"] / peaks["base"]
    floor = mixing_floor(case)
    base, ours = (timings.median(side) for side in ("base", "uniform"))
    row = [f"LLaMA 350M bf16, {mode}", "uniform", f"{base * 1e3:.1f} ms", f"{ours * 1e3:.1f} ms"]
    row += [f"{ratio}, floor {1 + floor / base:.3f}", "", f"{peaks['base'] / 2**30:.1f} GiB"]
    data = {
        "model": "LLaMA 350M",
        "mode": mode,
        "device": torch.cuda.get_device_name(),
        "seconds": {"base": base, "uniform": ours, "floor of mixing": floor},
        "time ratio": as_data(ratio),
        "memory ratio": round(memory, 5),
    }
    return [*row, f"{memory:.4f}"], data


def cuda_peak(step: Step) -> int:
    """Bytes of the caching allocator at their highest. Other models' weights are subtracted."""
    torch.cuda.synchronize()
    step()
    others = torch.cuda.memory_allocated() - step.state_bytes
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - others


def mixing_floor(case: Case) -> float:
    """Seconds that the reads and writes of mixing take at the bandwidth of a copy."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    copies = torch.empty_like(source)
    copies.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        copies.copy_(source)
    torch.cuda.synchronize()
    bandwidth = 20 * 2 * source.numel() / (time.perf_counter() - start)
    sums = case.states * (case.states + 1) // 2
    return (2 * sums + 5 * case.states) * case.bytes / bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--cuda", action="store_true", help="also the 350M LLaMA on a GPU")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(options.threads)
    rows: list[list[str]] = []
    data: list[dict[str, Any]] = []
    for name in options.models:
        more_rows, more_data = on_cpu(name, options.rounds)
        rows += more_rows
        data += more_data
    for mode in ("eager", "compiled"):
        if options.cuda and torch.cuda.is_available():
            row, entry = on_cuda(mode, options.rounds)
            data.append(entry)
        else:
            row = [f"LLaMA 350M bf16, {mode}", "uniform", *[NO_GPU] * 6]
        rows.append(row)
    header = [
        "training step",
        "start",
        "unmodified",
        "ancre",
        f"time ratio (limit {TIME_LIMIT})",
        "ratio of CPU seconds",
        "peak, unmodified",
        f"peak ratio (limit {MEMORY_LIMIT})",
    ]
    load = os.getloadavg()[1]
    text = f"{table(header, rows)}\n\nload of the machine while this ran: {load:.1f}"
    report("ancre_step", text, {"rows": data, "load": load})


if __name__ == "__main__":
    main()
