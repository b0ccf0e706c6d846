"""``surgery.convert`` against ``cp``: merge-LoRA and cast of a synthetic LLaMA checkpoint.

A checkpoint in the LLaMA layout is made in shards of 1 GB (bfloat16), with a LoRA of rank 16 on
every linear layer in PEFT's format. In turns, each in a process of its own:

- ``cp --reflink=never`` of the shards, then fsync of each;
- convert: merge the adapter, same dtype;
- convert: cast to float16, same bytes.

The source is taken out of the page cache before each. Hashing and verification are timed apart: in
the runs that are compared with ``cp`` the benchmark leaves them out, and one further run of each
has them in. Growth of the resident memory is the highest resident size during the conversion over
that after all imports, from the kernel.

PEFT's own merge (load, ``merge_and_unload``, ``save_pretrained``) holds the model in memory; it is
compared on a smaller checkpoint (``--peft-gb``), in the same run, beside ours on the same one.

To reach: at least 0.7 times the speed of ``cp``, growth at most twice the largest tensor.

Run: ``python benchmarks/convert/convert.py [--gb 8] [--rounds 2] [--peft-gb 1] [--place /tmp]``
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import report, table

from surgery.checkpoints import tensorfile
from surgery.checkpoints.saving import index_of, shards_of

SPEED, GROWTH = 0.7, 2.0
SHARD = 10**9
RANK = 16
VOCABULARY = 32_000
LINEARS = {
    "self_attn.q_proj": (0, 0),
    "self_attn.k_proj": (0, 0),
    "self_attn.v_proj": (0, 0),
    "self_attn.o_proj": (0, 0),
    "mlp.gate_proj": (1, 0),
    "mlp.up_proj": (1, 0),
    "mlp.down_proj": (0, 1),
}


def shapes(gigabytes: float) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A configuration of LLaMA of about this size, and the shape of every tensor."""
    width, inner = (4096, 11008) if gigabytes >= 2 else (2048, 5632)
    sizes = (width, inner)
    layer = {name: (sizes[a], sizes[b]) for name, (a, b) in LINEARS.items()}
    per_layer = 2 * (sum(a * b for a, b in layer.values()) + 2 * width)
    ends = 4 * VOCABULARY * width
    layers = max(1, round((gigabytes * 10**9 - ends) / per_layer))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for number in range(layers):
        prefix = f"model.layers.{number}"
        found |= {f"{prefix}.{name}.weight": shape for name, shape in layer.items()}
        found |= {
            f"{prefix}.{norm}.weight": (width,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    found |= {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return config, found


def make(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write a checkpoint and an adapter; bytes of the checkpoint and of its largest tensor."""
    config, found = shapes(gigabytes)
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config))
    drawn = (torch.randn(max(a * b for a, b, *_ in ((*s, 1) for s in found.values()))) * 0.02).to(
        torch.bfloat16
    )
    forms = [(n, torch.empty(s, dtype=torch.bfloat16, device="meta")) for n, s in found.items()]
    cut = shards_of(forms, SHARD)
    places: dict[str, str] = {}
    for number, shard in enumerate(cut, start=1):
        name = f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        values = [(each, drawn[: form.numel()].view(form.shape)) for each, form in shard]
        tensorfile.write(source / name, values, lambda _: None)
        places |= {each: name for each, _ in shard}
    total = sum(2 * form.numel() for _, form in forms)
    (source / "model.safetensors.index.json").write_text(index_of(total, places))
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [name.rpartition(".")[2] for name in LINEARS],
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    factors: list[tuple[str, torch.Tensor]] = []
    for name, shape in found.items():
        if name.removesuffix(".weight").rpartition(".")[2] in settings["target_modules"]:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            factors.append((f"{prefix}.lora_A.weight", torch.randn(RANK, shape[1]) * 0.02))
            factors.append((f"{prefix}.lora_B.weight", torch.randn(shape[0], RANK) * 0.02))
    tensorfile.write(adapter / "adapter_model.safetensors", factors, lambda _: None)
    return total, max(2 * form.numel() for _, form in forms)


def copied(folder: Path, out: Path) -> dict[str, float]:
    """``cp --reflink=never`` and fsync of every shard."""
    out.mkdir()
    begun, cpu = time.perf_counter(), spent(resource.RUSAGE_CHILDREN)
    shards = sorted(str(each) for each in (folder / "source").glob("*.safetensors"))
    subprocess.run(["cp", "--reflink=never", *shards, str(out)], check=True)  # noqa: S607
    for each in (*out.iterdir(), out):
        handle = os.open(each, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "cpu": spent(resource.RUSAGE_CHILDREN) - cpu}


def spent(whose: int) -> float:
    """CPU seconds, those of the kernel included."""
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def child(task: str, folder: Path, out: Path, hashing: bool, threads: int) -> dict[str, Any]:
    """One conversion, in this process."""
    import surgery
    from surgery.conversion import engine, run

    torch.set_num_threads(1)
    if task == "peft":
        return merged_by_peft(folder, out)
    surgery.load("transformers:LlamaForCausalLM", config={"num_hidden_layers": 1}, device="meta")
    if not hashing:
        engine._examined = lambda *_: ("0" * 64, {})
        run.sha256_of = lambda *_: "0" * 64
        run._digests = lambda *_: {}
    Path("/proc/self/clear_refs").write_text("5")
    before, begun, cpu = resident("VmRSS"), time.perf_counter(), spent(resource.RUSAGE_SELF)
    options: dict[str, Any] = (
        {"adapter": folder / "adapter"} if task == "merge" else {"dtype": "float16"}
    )
    done = surgery.convert(folder / "source", None, out, threads=threads, **options)
    return {
        "seconds": time.perf_counter() - begun,
        "cpu": spent(resource.RUSAGE_SELF) - cpu,
        "growth": resident("VmHWM") - before,
        "stages": dict(done.seconds),
    }


def merged_by_peft(folder: Path, out: Path) -> dict[str, Any]:
    """PEFT's merge of the same adapter into the same checkpoint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    Path("/proc/self/clear_refs").write_text("5")
    before, begun = resident("VmRSS"), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder / "source")
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    merged.save_pretrained(out, max_shard_size="1GB")
    for each in out.iterdir():
        handle = os.open(each, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "growth": resident("VmHWM") - before}


def apart(task: str, folder: Path, out: Path, *, hashing: bool, threads: int) -> dict[str, Any]:
    """``child`` in a process of its own."""
    command = [sys.executable, __file__, "--child", task, "--place", str(folder), "--out", str(out)]
    command += ["--threads", str(threads), *(["--hashing"] if hashing else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cold(folder: Path) -> None:
    """Take the source out of the page cache, so that every case reads it from the disk."""
    os.sync()
    for each in folder.iterdir():
        handle = os.open(each, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measured(
    folder: Path, cases: Mapping[str, Callable[[Path], dict[str, Any]]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Every case in every round, its output removed afterwards."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            out = folder / "out"
            cold(folder / "source")
            found[name].append(case(out))
            print(name, found[name][-1], file=sys.stderr, flush=True)
            shutil.rmtree(out)
    return found


def compare(folder: Path, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The main table."""
    total, largest = make(folder, arguments.gb)
    threads = arguments.threads

    def ours(task: str, hashing: bool) -> Callable[[Path], dict[str, Any]]:
        return lambda out: apart(task, folder, out, hashing=hashing, threads=threads)

    tasks = {"cp + fsync": lambda out: copied(folder, out)}
    tasks |= {"merge": ours("merge", False), "cast": ours("cast", False)}
    found = measured(folder, tasks, arguments.rounds)
    whole = measured(folder, {"merge": ours("merge", True), "cast": ours("cast", True)}, 1)
    reference = [each["seconds"] for each in found["cp + fsync"]]
    cpu = statistics.median(each["cpu"] for each in found["cp + fsync"])
    time_of_cp = f"{statistics.median(reference):.1f} s"
    rows = [["cp + fsync", time_of_cp, f"{cpu:.1f} s", "1", "", "", ""]]
    data: dict[str, Any] = {"bytes": total, "largest": largest, "runs": found, "hashed": whole}
    for name in ("merge", "cast"):
        seconds = [each["seconds"] for each in found[name]]
        speed = statistics.median(a / b for a, b in zip(reference, seconds, strict=True))
        growth = max(each["growth"] for each in (*found[name], *whole[name]))
        cpu = statistics.median(each["cpu"] for each in found[name])
        data[name] = {"speed": speed, "growth": growth / largest}
        cells = [name, f"{statistics.median(seconds):.1f} s", f"{cpu:.1f} s", f"{speed:.2f}"]
        cells += [f"{whole[name][0]['seconds']:.1f} s", f"{growth / 2**20:.0f} MiB"]
        rows.append([*cells, f"{growth / largest:.2f}"])
    header = ["", "time", "CPU", "speed of cp", "with hashing", "growth", "/ largest tensor"]
    title = f"{total / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB, {threads} threads"
    return f"{title}\n\n{table(header, rows)}", data


def beside_peft(folder: Path, gigabytes: float, threads: int) -> tuple[str, dict[str, Any]]:
    """Merge by PEFT and by us of one checkpoint that fits in memory."""
    total, _ = make(folder, gigabytes)
    cases = {
        name: lambda out, name=name: apart(name, folder, out, hashing=True, threads=threads)
        for name in ("merge", "peft")
    }
    found = measured(folder, cases, 2)
    rows = [
        [label, f"{min(e['seconds'] for e in found[name]):.1f} s", f"{growth / 2**20:.0f} MiB"]
        for name, label in (("merge", "surgery convert, with hashes"), ("peft", "PEFT"))
        for growth in [max(each["growth"] for each in found[name])]
    ]
    text = f"Merge of {total / 1e9:.2f} GB, imports left out\n\n"
    return text + table(["", "best time", "growth"], rows), {"bytes": total, "runs": found}


def main() -> None:
    """Make, measure, report, and remove what was made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--peft-gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--hashing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        given = (arguments.place, arguments.out, arguments.hashing, arguments.threads)
        print(json.dumps(child(arguments.child, *given)))
        return
    texts: list[str] = []
    data: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.place, prefix="bench-convert-") as made:
        text, data["convert"] = compare(Path(made) / "large", arguments)
        texts.append(text)
        shutil.rmtree(Path(made) / "large")
        if arguments.peft_gb:
            text, data["peft"] = beside_peft(
                Path(made) / "small", arguments.peft_gb, arguments.threads
            )
            texts.append(text)
    report("convert", "\n\n".join(texts), data)
    reached = all(
        data["convert"][name]["speed"] >= SPEED and data["convert"][name]["growth"] <= GROWTH
        for name in ("merge", "cast")
    )
    print("reached" if reached else "NOT reached")


if __name__ == "__main__":
    main()
