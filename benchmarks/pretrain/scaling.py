"""What the history of learned shortcuts costs at scale: predicted, measured here, extrapolated.

`memory_model` predicts the memory of a training step buffer by buffer. This script compares that
with torch's allocator on LLaMAs that fit here, counts the bytes that mixing moves, sets the time
they should take beside `results/ancre_step.json` and `results/mixing.json`, and only then does the
arithmetic for LLaMA 1B, 8B and 70B. It writes the tables between the markers of `docs/scaling.md`.

Run: ``python -m benchmarks.pretrain.scaling [--threads 1] [--no-measure]``
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import surgery
from architectures.shortcuts import kernels
from benchmarks.harness import RESULTS, table
from benchmarks.pretrain.memory_model import (
    Memory,
    Shape,
    border_states,
    held_in_stage,
    mixing_bytes,
    simulate,
    step_operations,
)
from surgery import Rule, Shortcuts

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
MEASURED = RESULTS / "scaling.json"
MIB, GIB = 2**20, 2**30

TINY = Shape(128, 344, 8, 4, 264, batch=4, length=128)
MEDIUM = Shape(512, 1376, 8, 8, 4096, batch=2, length=128)
CASES: dict[str, Shape] = {
    "width 128, 8 blocks": TINY,
    "width 128, 8 blocks, bf16": replace(TINY, itemsize=2),
    "width 128, 32 blocks": replace(TINY, layers=32),
    "width 512, 8 blocks": MEDIUM,
    "width 128, 16 blocks": replace(TINY, layers=16),
}
# Activation checkpointing, and whether gradients of parameters are there before the step.
VARIANTS = ((False, False), (True, False), (True, True))
# The case of `ancre_step.py`: 8 sequences of 256 tokens, vocabulary of 32000.
LLAMA_60M = Shape(512, 1376, 8, 8, 32000, batch=8, length=256)
# Only its states are used: 8 images of 197 tokens, 12 blocks of width 384.
VIT_S = Shape(384, 1536, 12, 6, 1000, batch=8, length=197)


@dataclass(frozen=True)
class Row:
    """A case, with what was predicted and what was measured, in bytes.

    Attributes:
        case: Key of ``CASES``.
        history: Whether states are mixed.
        checkpointing: Whether blocks run again in the backward pass.
        resident: Whether gradients of parameters are there before the step.
        predicted: Kept between forward and backward, and peak.
        measured: The same, of torch's allocator.
    """

    case: str
    history: bool
    checkpointing: bool
    resident: bool
    predicted: Memory
    measured: Memory


# --- measuring ------------------------------------------------------------------------------


def build(shape: Shape, *, history: bool) -> nn.Module:
    """A LLaMA of transformers with random weights, in train mode."""
    config = {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "vocab_size": shape.vocabulary,
        "use_cache": False,
        "tie_word_embeddings": shape.tied,
    }
    torch.manual_seed(0)
    dtype = torch.float32 if shape.itemsize == 4 else torch.bfloat16
    source = "transformers:LlamaForCausalLM"
    model = surgery.load(source, config=config, pretrained=False, dtype=dtype)
    if history:
        surgery.apply(model, Rule(Shortcuts(init="uniform")))
    return model.train()


def loss_of(model: Any, shape: Shape) -> Callable[[], Tensor]:
    """A forward pass to the loss on one fixed batch."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=draw)
    return lambda: model(ids, labels=ids).loss


def measure(model: Any, shape: Shape, *, checkpointing: bool, resident: bool) -> Memory:
    """What torch's allocator hands out in a forward and a backward pass."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    loss = loss_of(model, shape)
    loss().backward()  # tables of rotary embeddings and the like are made once
    model.zero_grad(set_to_none=not resident)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        held = loss()
    kept = sum(_allocations(forward))
    del held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as step:
        loss().backward()
    live = peak = 0
    for size in _allocations(step):
        live += size
        peak = max(peak, live)
    model.zero_grad(set_to_none=True)
    return Memory(kept, peak)


def _allocations(profiler: profile) -> list[int]:
    """Bytes taken (positive) and given back (negative) on the CPU, in order of time."""
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def counting() -> Iterator[list[int]]:
    """The bytes of every tensor that a mixing kernel reads or writes meanwhile."""
    found: list[int] = []
    combine, pull = kernels.combine, kernels.pull

    def counted_combine(base: Tensor, scale: Any, row: Tensor, states: Sequence[Tensor]) -> Tensor:
        mixed = combine(base, scale, row, states)
        found.extend(tensor.nbytes for tensor in (base, *states, mixed))
        return mixed

    def counted_pull(
        state: Tensor, gradient: Any, row: Tensor, gradients: Sequence[Tensor], **needs: bool
    ) -> tuple[Any, Any]:
        total, products = pull(state, gradient, row, gradients, **needs)
        tensors = (state, gradient, total, *gradients)
        found.extend(tensor.nbytes for tensor in tensors if tensor is not None)
        return total, products

    with (
        mock.patch.object(kernels, "combine", counted_combine),
        mock.patch.object(kernels, "pull", counted_pull),
    ):
        yield found


def moved(model: nn.Module, shape: Shape) -> int:
    """Bytes that the kernels of mixing are given and give, in one step of a rewired model."""
    loss = loss_of(model, shape)
    with counting() as found:
        loss().backward()
    return sum(found)


def measure_case(case: str) -> tuple[list[Row], int]:
    """Every variant of a case, without and with history in turns; and the bytes of mixing."""
    shape = CASES[case]
    models = {history: build(shape, history=history) for history in (False, True)}
    traffic = moved(models[True], shape)
    rows: list[Row] = []
    for checkpointing, resident in VARIANTS:
        for history, model in models.items():
            sides = {"checkpointing": checkpointing, "resident": resident}
            measured = measure(model, shape, **sides)
            predicted = simulate(shape, history=history, **sides)
            rows.append(Row(case, history, checkpointing, resident, predicted, measured))
    return rows, traffic


# --- what the measurements say --------------------------------------------------------------


def memory_table(rows: Sequence[Row]) -> str:
    """Prediction against measurement."""
    header = [
        "case",
        "checkpointing",
        "gradients",
        "history",
        "kept, predicted",
        "measured",
        "error",
        "peak, predicted",
        "measured",
        "error",
    ]
    lines: list[list[str]] = []
    for row in rows:
        line = [*_variant(row), "yes" if row.history else "no"]
        for ours, theirs in _pairs(row):
            line += [f"{ours / MIB:.2f} MiB", f"{theirs / MIB:.2f} MiB", error(ours, theirs)]
        lines.append(line)
    return table(header, lines)


def overhead_table(rows: Sequence[Row], cases: Mapping[str, Shape]) -> str:
    """What a history adds, counted in states."""
    header = [
        "case",
        "checkpointing",
        "gradients",
        "one state",
        "kept, predicted",
        "measured",
        "peak, predicted",
        "measured",
    ]
    lines: list[list[str]] = []
    for base, ours in zip(rows[::2], rows[1::2], strict=True):
        state = cases[base.case].state
        line = [*_variant(base), f"{state / MIB:.3f} MiB"]
        for without, with_history in zip(_pairs(base), _pairs(ours), strict=True):
            added = [after - before for before, after in zip(without, with_history, strict=True)]
            line += [f"{size / state:+.2f}" for size in added]
        lines.append(line)
    return table(header, lines)


def _variant(row: Row) -> list[str]:
    gradients = "there before" if row.resident else "made in it"
    return [row.case, "on" if row.checkpointing else "off", gradients]


def _pairs(row: Row) -> list[tuple[int, int]]:
    """Predicted and measured: what is kept, and the peak."""
    return [(row.predicted.kept, row.measured.kept), (row.predicted.peak, row.measured.peak)]


def worst(rows: Sequence[Row]) -> dict[str, float]:
    """The largest relative errors of the table."""
    kept, peak = zip(*(_pairs(row) for row in rows), strict=True)
    return {
        "kept": max(abs(ours / theirs - 1) for ours, theirs in kept),
        "peak": max(abs(ours / theirs - 1) for ours, theirs in peak),
    }


def traffic_table(traffic: Mapping[str, int], cases: Mapping[str, Shape]) -> str:
    """Bytes of mixing: the formula against what the kernels were given."""
    lines: list[list[str]] = []
    for case, counted in traffic.items():
        expected = mixing_bytes(cases[case].layers, cases[case].state)
        sizes = [f"{size / MIB:.2f} MiB" for size in (expected, counted)]
        lines.append([case, *sizes, error(expected, counted)])
    return table(["case", "(2R + 5K) S", "counted", "error"], lines)


def earlier_table(step: Mapping[str, Any], mixing: Mapping[str, Any]) -> str:
    """The published benchmarks: peak memory, and time from bytes and bandwidth alone."""
    mix = mixing["rows"][0]
    bandwidth = mix["floor_bytes"] / mix["seconds"]["floor"]
    slower = mix["seconds"]["ours"] / mix["seconds"]["floor"]
    header = [
        "step",
        "start",
        "mixing moves",
        "time ratio, floor",
        "predicted",
        "measured [95 %]",
        "peak, predicted",
        "measured",
    ]
    lines: list[list[str]] = []
    for row in step["rows"]:
        if "init" not in row:
            continue
        is_vit = row["model"].startswith("ViT")
        shape = VIT_S if is_vit else LLAMA_60M
        size = mixing_bytes(shape.layers, shape.state)
        floor = size / bandwidth / row["seconds"]["base"]
        ratio = row["time ratio"]
        peak = simulate(shape, history=True, checkpointing=False).peak + 12 * shape.parameters
        lines.append(
            [
                row["model"],
                row["init"],
                f"{size / 1e6:.0f} MB",
                f"{1 + floor:.3f}",
                f"{1 + slower * floor:.3f}",
                f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
                "no model of it" if is_vit else f"{peak / MIB:.1f} MiB",
                f"{row['peak bytes'][row['init']] / MIB:.1f} MiB",
            ]
        )
    return table(header, lines)


def error(predicted: float, measured: float) -> str:
    """Relative error of a prediction."""
    return f"{predicted / measured - 1:+.2%}"


# --- arithmetic for large models ------------------------------------------------------------


@dataclass(frozen=True)
class Large:
    """A model that does not fit here, as it would be trained.

    Attributes:
        shape: With the micro-batch of one device, in bfloat16.
        stages: Pipeline stages of the example.
        tensor: Tensor-parallel ranks of the example.
        shards: FSDP2 ranks of the example.
    """

    shape: Shape
    stages: int
    tensor: int
    shards: int


# 1B as GaLore and ANCRe train it (16 sequences of 256 on each of 8 GPUs); 8B and 70B are the sizes
# of Llama 3 (arXiv 2407.21783) with one sequence of 8192 tokens.
LARGE: dict[str, Large] = {
    "1B": Large(Shape(2048, 5461, 24, 32, 32000, batch=16, length=256, itemsize=2), 4, 2, 8),
    "8B": Large(Shape(4096, 14336, 32, 32, 128256, 1, 8192, kv_heads=8, itemsize=2), 4, 4, 8),
    "70B": Large(Shape(8192, 28672, 80, 64, 128256, 1, 8192, kv_heads=8, itemsize=2), 8, 8, 64),
}
# One H100 SXM by its data sheet, at shares that are commonly reached: assumptions, not measured.
FLOPS, UTILISATION = 989e12, 0.4
BANDWIDTH, BANDWIDTH_SHARE = 3.35e12, 0.8
LINK = 50e9


def size_table() -> str:
    """The models, and what their history holds."""
    header = ["", "parameters", "K", "tokens on a device", "state S", "K · S", "coefficients"]
    lines = [
        [
            name,
            f"{large.shape.parameters / 1e9:.2f} G",
            str(large.shape.layers),
            str(large.shape.tokens),
            mib(large.shape.state),
            gib(large.shape.layers * large.shape.state),
            str(large.shape.layers * (large.shape.layers + 1) // 2),
        ]
        for name, large in LARGE.items()
    ]
    return table(header, lines)


def device_table() -> str:
    """Peak of activations on a device, without and with a history."""
    header = [
        "",
        "checkpointing",
        "gradients",
        "kept",
        "with history",
        "peak less weights",
        "with history",
        "more",
        "in states",
    ]
    lines: list[list[str]] = []
    for name, large in LARGE.items():
        shape = large.shape
        for checkpointing, resident in VARIANTS:
            sides = {"checkpointing": checkpointing, "resident": resident}
            base = simulate(shape, history=False, **sides)
            ours = simulate(shape, history=True, **sides)
            more = ours.peak - base.peak
            lines.append(
                [
                    name,
                    "on" if checkpointing else "off",
                    "there before" if resident else "made in it",
                    *(gib(size) for size in (base.kept, ours.kept, base.peak, ours.peak)),
                    f"{more / base.peak:.1%}",
                    f"{more / shape.state:.1f}",
                ]
            )
    return table(header, lines)


def time_table() -> str:
    """What mixing moves and how long that takes beside the step, by data-sheet figures."""
    header = [
        "",
        "mixing moves",
        "at 2.68 TB/s",
        "step at 40 % of 989 TFLOP/s",
        "share",
        "K/2 sites",
    ]
    lines: list[list[str]] = []
    for name, large in LARGE.items():
        shape = large.shape
        size = mixing_bytes(shape.layers, shape.state)
        seconds = size / (BANDWIDTH * BANDWIDTH_SHARE)
        half = mixing_bytes(shape.layers // 2, shape.state) / (BANDWIDTH * BANDWIDTH_SHARE)
        step = step_operations(shape, checkpointing=False) / (FLOPS * UTILISATION)
        lines.append(
            [
                name,
                f"{size / 1e9:.1f} GB",
                f"{seconds * 1e3:.1f} ms",
                f"{step * 1e3:.0f} ms",
                f"{seconds / step:.1%}",
                f"{half / step:.1%}",
            ]
        )
    return table(header, lines)


def sharding_table() -> str:
    """Data parallelism: what a history adds to what ranks send each other."""
    header = [
        "",
        "DDP: gradients reduced",
        "of it coefficients",
        "FSDP2 ranks",
        "weights gathered in a step",
        "of it coefficients",
        "states sent",
    ]
    lines: list[list[str]] = []
    for name, large in LARGE.items():
        shape = large.shape
        coefficients = 4 * shape.layers * (shape.layers + 1) // 2
        lines.append(
            [
                name,
                gib(2 * shape.parameters),
                f"{coefficients / 1024:.1f} KiB",
                str(large.shards),
                gib(2 * 2 * shape.parameters),
                f"{coefficients / 1024:.1f} KiB",
                "0",
            ]
        )
    return table(header, lines)


def pipeline_table() -> str:
    """Pipeline parallelism: bytes over the borders, and states held in the stages."""
    header = [
        "",
        "stages",
        "over a border without",
        "busiest border with history",
        "at 50 GB/s, both ways",
        "compute of a stage",
        "all borders, times as much",
        "fullest stage holds without",
        "with history",
    ]
    lines: list[list[str]] = []
    for name, large in LARGE.items():
        shape, stages = large.shape, large.stages
        added = [border_states(shape.layers, stages, border) for border in range(1, stages)]
        held = [held_in_stage(shape.layers, stages, stage) for stage in range(stages)]
        busiest = (1 + max(added)) * shape.state
        compute = step_operations(shape, checkpointing=True) / (FLOPS * UTILISATION) / stages
        lines.append(
            [
                name,
                str(stages),
                mib(shape.state),
                mib(busiest),
                f"{2 * busiest / LINK * 1e3:.0f} ms",
                f"{compute * 1e3:.0f} ms",
                f"{1 + sum(added) / len(added):.1f}",
                gib(max(before for before, _ in held) * shape.state),
                gib(max(after for _, after in held) * shape.state),
            ]
        )
    return table(header, lines)


def tensor_table() -> str:
    """Tensor parallelism: the history replicated, or split along the sequence."""
    header = [
        "",
        "ranks",
        "history, replicated",
        "split along the sequence",
        "share of time, replicated",
        "split",
        "coefficient gradients reduced",
    ]
    lines: list[list[str]] = []
    for name, large in LARGE.items():
        shape, ranks = large.shape, large.tensor
        whole = shape.layers * shape.state
        seconds = mixing_bytes(shape.layers, shape.state) / (BANDWIDTH * BANDWIDTH_SHARE)
        step = step_operations(shape, checkpointing=False) / (FLOPS * UTILISATION)
        coefficients = 4 * shape.layers * (shape.layers + 1) // 2
        lines.append(
            [
                name,
                str(ranks),
                gib(whole),
                gib(whole / ranks),
                f"{seconds / (step / ranks):.1%}",
                f"{seconds / step:.1%}",
                f"{coefficients / 1024:.1f} KiB",
            ]
        )
    return table(header, lines)


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / MIB:.0f} MiB"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


# --- the document ---------------------------------------------------------------------------


def tables(rows: Sequence[Row], traffic: Mapping[str, int]) -> dict[str, str]:
    """Name of a marker in the document → the table that belongs there."""
    step = json.loads((RESULTS / "ancre_step.json").read_text())
    mixing = json.loads((RESULTS / "mixing.json").read_text())
    return {
        "memory": memory_table(rows),
        "overhead": overhead_table(rows, CASES),
        "traffic": traffic_table(traffic, CASES),
        "earlier": earlier_table(step, mixing),
        "sizes": size_table(),
        "device": device_table(),
        "time": time_table(),
        "sharding": sharding_table(),
        "pipeline": pipeline_table(),
        "tensor": tensor_table(),
    }


def fill(text: str, named: Mapping[str, str]) -> str:
    """A document with every table between its markers, ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises:
        ValueError: a table has no place, or a place has no table.
    """
    places = set(re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE))
    if places != named.keys():
        raise ValueError(f"places {sorted(places)}, tables {sorted(named)}")
    for name, content in named.items():
        between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        text = between.sub(lambda _, content=content: content + "\n", text)
    return text


def save(rows: Sequence[Row], traffic: Mapping[str, int]) -> None:
    """Write what was measured, so that the document can be made again without measuring."""
    measured = [{k: v for k, v in asdict(row).items() if k != "predicted"} for row in rows]
    data = {"torch": torch.__version__, "rows": measured, "traffic": dict(traffic)}
    MEASURED.write_text(json.dumps(data, indent=1) + "\n")


def saved() -> tuple[list[Row], dict[str, int]]:
    """What was measured before, beside today's predictions."""
    data = json.loads(MEASURED.read_text())
    rows: list[Row] = []
    for row in data["rows"]:
        sides = {key: row[key] for key in ("history", "checkpointing", "resident")}
        predicted = simulate(CASES[row["case"]], **sides)
        rows.append(
            Row(row["case"], **sides, predicted=predicted, measured=Memory(**row["measured"]))
        )
    return rows, data["traffic"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-measure", action="store_true", help="use what was measured before")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    traffic: dict[str, int] = {}
    for case in () if options.no_measure else CASES:
        found, traffic[case] = measure_case(case)
        rows += found
        save(rows, traffic)
        print(case, worst(rows), flush=True)
    rows, traffic = saved()
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), tables(rows, traffic)))
    print(f"largest errors: {worst(rows)}; wrote {DOCUMENT.name}")


if __name__ == "__main__":
    main()
