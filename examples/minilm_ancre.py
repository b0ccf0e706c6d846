"""Give a pretrained sentence encoder learned shortcuts, and fine-tune it with and without them.

The model is all-MiniLM-L6-v2 with its real weights, six BERT layers; the task and the texts are
those of minilm.py: which package of Python's standard library does a docstring come from?

Every layer's input feeds every later layer with a learned coefficient, as in ANCRe (arXiv
2602.09009), from a start that changes nothing (which is not the authors': theirs is for models
that are trained from scratch). Both models then get the same texts, dropout masks, steps and
learning rates; the coefficients are the only difference.

Run: ``python examples/minilm_ancre.py [--out demo-out] [--steps 50]``
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
from dataclasses import dataclass
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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import surgery
from surgery import Freeze, Rule

RULES = Path(__file__).parents[1] / "configs" / "rules" / "ancre-identity.yaml"
ENCODER_RATE, HEAD_RATE = 2e-5, 2e-4
# The temperature is 0.01: a step of Adam moves what goes into the softmax by a hundredth.
COEFFICIENT_RATE = 1e-4
THRESHOLD = 0.03


@dataclass
class Result:
    """One fine-tuned model.

    Attributes:
        losses: Training loss of every step.
        right: Which test texts it names rightly, (texts,) of bool.
    """

    losses: list[float]
    right: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the test texts."""
        return self.right.double().mean().item()


def main() -> None:
    """Run the demo from start to end; any claim that does not hold stops it."""
    parser = argparse.ArgumentParser(description="Learned shortcuts for a pretrained encoder.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--steps", type=int, default=50, help="of training, for each model")
    parser.add_argument("--texts", type=int, default=200, help="of a package to train on, at most")
    args = parser.parse_args()
    torch.manual_seed(0)
    demo = load(args.texts)
    without = copy.deepcopy(demo.model)
    rewire(demo)
    head = compare(demo, without, args.steps)
    learned = freeze(demo, head)
    keep(demo, args.out, learned)
    show_proofs(demo.proofs)


def rewire(demo: Demo) -> None:
    """Steps 2 and 3: the plan, and the proof that the start changes nothing."""
    heading("2. Plan: what the rule file would do; nothing is changed yet")
    plan = surgery.plan(demo.model, RULES, example=demo.batch)
    console.print(plan)
    heading("3. Apply, and compare")
    plan.apply()
    same = torch.equal(embed(demo.model, demo.batch), demo.original)
    must(same, "the embeddings stay equal")
    demo.proofs.append(("embeddings of 64 real texts after apply", "bitwise equal"))
    report = surgery.verify(demo.model, example={k: v[:2] for k, v in demo.batch.items()})
    must(report.ok, "verify passes")
    console.print("The embeddings of 64 texts are equal bit for bit; surgery.verify agrees.")
    demo.proofs.append(("verify: outputs, gradients of all stock parameters, two shapes", "ok"))


def compare(demo: Demo, without: nn.Module, steps: int) -> nn.Linear:
    """Step 4: fine-tune both; returns the head of the model with shortcuts."""
    heading(f"4. Fine-tune all parameters for {steps} steps of {BATCH}, with and without shortcuts")
    console.print(
        f"AdamW, learning rates: encoder {ENCODER_RATE:g}, head {HEAD_RATE:g}, "
        f"coefficients {COEFFICIENT_RATE:g} without weight decay"
    )
    probe = linear_probe(demo)
    start = right_ones(demo, demo.model, probe)
    plain = fine_tune(demo, without, copy.deepcopy(probe), steps)
    ours = fine_tune(demo, demo.model, probe, steps)
    must(plain.losses[0] == ours.losses[0], "the first training losses are equal")
    demo.proofs.append(("first training loss, dropout on, with and without", "bitwise equal"))
    show_curves(plain, ours)
    table = Table("model", f"accuracy on {len(demo.test.texts)} docstrings of unseen modules")
    table.add_row("majority class", f"{majority_accuracy(demo.test):.1%}")
    table.add_row("linear probe on the frozen model", f"{start.double().mean().item():.1%}")
    table.add_row("fine-tuned", f"{plain.accuracy:.1%}")
    table.add_row("fine-tuned with shortcuts", f"{ours.accuracy:.1%}")
    console.print(table)
    console.print(judged(plain, ours))
    return probe


def fine_tune(demo: Demo, model: nn.Module, head: nn.Linear, steps: int) -> Result:
    """Train a model and a head; texts and dropout masks are the same for every model."""
    groups = surgery.parameter_groups(model, weight_decay=0.01)
    peaks = [*(ENCODER_RATE, COEFFICIENT_RATE)[: len(groups)], HEAD_RATE]
    optimizer = torch.optim.AdamW([*groups, {"params": head.parameters()}])
    labels = torch.tensor(demo.train.labels)
    order = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model.train()
    losses: list[float] = []
    with console.status("training") as status:
        for step in range(steps):
            chosen = torch.randint(len(labels), (BATCH,), generator=order)
            batch = tokenize(demo.tokenizer, [demo.train.texts[i] for i in chosen])
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 - step / steps)
            loss = cross_entropy(head(pooled(model, batch)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            status.update(f"step {step + 1} of {steps}, loss {losses[-1]:.3f}")
    return Result(losses, right_ones(demo, model, head))


@torch.no_grad()
def right_ones(demo: Demo, model: nn.Module, head: nn.Linear) -> Tensor:
    """Which test docstrings get the right package: (texts,) of bool."""
    inputs = all_embeddings(dataclasses.replace(demo, model=model), demo.test.texts)
    return head(inputs).argmax(-1) == torch.tensor(demo.test.labels)


def show_curves(plain: Result, ours: Result) -> None:
    """Mean training losses of five stretches of the run."""
    table = Table("steps", "training loss without", "with shortcuts")
    count = len(plain.losses)
    bounds = [count * i // 5 for i in range(6)]
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        means = [sum(each.losses[start:stop]) / (stop - start) for each in (plain, ours)]
        table.add_row(f"{start + 1} to {stop}", *(f"{mean:.3f}" for mean in means))
    console.print(table)


def judged(plain: Result, ours: Result) -> str:
    """Whether the two accuracies differ by more than chance, by the texts they disagree on."""
    gained = int((ours.right & ~plain.right).sum())
    lost = int((plain.right & ~ours.right).sum())
    noise = 2 * (gained + lost) ** 0.5
    verdict = "more than chance" if abs(gained - lost) > noise else "no more than chance"
    return (
        f"With shortcuts {gained} texts are right that were wrong without, and {lost} wrong that "
        f"were right: {verdict} (two standard errors: {noise:.0f} texts)."
    )


def freeze(demo: Demo, head: nn.Linear) -> dict[str, Tensor]:
    """Step 5: what was learned, which is returned, and what is left of it as constants."""
    heading(f"5. The learned coefficients, and those of {THRESHOLD:g} and more as constants")
    learned = surgery.shortcuts(demo.model)
    for name, matrix in learned.items():
        console.print(f"{name}: row k has the coefficients of the inputs of layers 0 to k")
        console.print(as_table(matrix))
    before, right = embed(demo.model, demo.batch), right_ones(demo, demo.model, head)
    plan = surgery.plan(demo.model, Rule(Freeze(threshold=THRESHOLD)), example=demo.batch)
    console.print(plan)
    plan.apply()
    after = embed(demo.model, demo.batch)
    change = ((after - before).norm() / before.norm()).item()
    kept = sum(int((matrix != 0).sum()) for matrix in surgery.shortcuts(demo.model).values())
    same = right_ones(demo, demo.model, head)
    console.print(
        f"{kept} coefficients are left; the embeddings change by {change:.2%} of their norm, "
        f"{int((same != right).sum())} of {len(right)} answers change"
    )
    names = [name for name, p in demo.model.named_parameters() if p.requires_grad]
    must(not any(".shortcuts." in name for name in names), "frozen coefficients do not train")
    return learned


def keep(demo: Demo, out: Path, learned: dict[str, Tensor]) -> None:
    """Step 6: save and restore, then take the freezing back."""
    heading("6. Save, restore, undo the freezing")
    frozen = embed(demo.model, demo.batch)
    surgery.save(demo.model, out / "rewired")
    restored = surgery.restore(out / "rewired")
    must(torch.equal(embed(restored, demo.batch), frozen), "restored equals saved")
    demo.proofs.append(
        ("restored model against the saved one, trained and frozen", "bitwise equal")
    )
    surgery.undo(demo.model, last=1)
    held = [torch.equal(learned[k], matrix) for k, matrix in surgery.shortcuts(demo.model).items()]
    must(all(held), "undo brings the learned coefficients back")
    demo.proofs.append(("coefficients after the freezing is undone", "bitwise equal"))
    console.print(f"The rewired model is in {out / 'rewired'}: surgery.restore loads it.")


def as_table(matrix: Tensor) -> Table:
    """The lower triangle of a (K, K) matrix."""
    table = Table("", *(f"x{j}" for j in range(len(matrix))))
    for k, row in enumerate(matrix):
        table.add_row(f"into x{k + 1}", *(f"{value:+.3f}" for value in row[: k + 1].tolist()))
    return table


if __name__ == "__main__":
    main()
