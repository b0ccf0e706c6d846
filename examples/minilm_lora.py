"""Rewrite a pretrained sentence encoder, prove it, fine-tune it, merge, save, restore, undo.

The model is all-MiniLM-L6-v2 (22.7 M parameters) with its real weights, the task that of minilm.py:
which package of Python's standard library does a docstring come from?

Run: ``python examples/minilm_lora.py [--out demo-out] [--seconds 60]``
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from minilm import (
    BATCH,
    Demo,
    all_embeddings,
    console,
    embed,
    heading,
    linear_probe,
    load,
    majority_accuracy,
    must,
    pooled,
    show_proofs,
    tokenize,
)
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

import surgery

RULES = Path(__file__).parents[1] / "configs" / "rules" / "lora-minilm.yaml"


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


@torch.no_grad()
def accuracy(demo: Demo, head: nn.Linear) -> float:
    """Share of test docstrings whose package is named rightly."""
    guesses = head(all_embeddings(demo, demo.test.texts)).argmax(-1)
    return (guesses == torch.tensor(demo.test.labels)).float().mean().item()


if __name__ == "__main__":
    main()
