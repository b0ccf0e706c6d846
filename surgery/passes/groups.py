"""Parameter groups for an optimizer of adapters, as LoRA+ has them (arXiv 2402.12354)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from surgery.capture.graft import grafts
from surgery.errors import ModelStateError
from surgery.passes.hosts import CHILD, HOSTS, Bank
from surgery.passes.streams import all_segments
from surgery.tree import children, named_modules, named_parameters

Group = Literal["A", "B", "B, no decay", "embedding", "coefficients"]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    ratio: float,
    weight_decay: float = 0.0,
    lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in groups with learning rates of their own.

    In LoRA+ B learns ``ratio`` times as fast as A, which is right for wide layers; parametrisation,
    start and forward are those of whatever method the adapters have::

        groups = surgery.adapters.parameter_groups(model, lr=1e-4, ratio=16)
        optimizer = torch.optim.AdamW(groups)

    As in PEFT's ``create_loraplus_optimizer``, what else is trainable goes along: vectors with B,
    without weight decay, and matrices with A. On a task that is hard, a lower ``lr`` makes up for
    the faster B.

    Args:
        model: A rewritten model.
        lr: Learning rate of A.
        ratio: That of B is ``ratio · lr``.
        weight_decay: Of everything but vectors and the coefficients of shortcuts.
        lr_embedding: Learning rate of both factors of embedding layers.

    Returns:
        The groups that are not empty, each with ``name``: ``A``, ``embedding``, ``B``,
        ``B, no decay`` and ``coefficients``, those of shortcuts, which learn as fast as A.

    Raises:
        ModelStateError: the model has no adapters, or nothing in it requires gradients.
        ValueError: a number is out of range.
    """
    _check(lr=lr, ratio=ratio, weight_decay=weight_decay, lr_embedding=lr_embedding)
    members = _members(model)
    made: dict[Group, tuple[float, float]] = {
        "A": (lr, weight_decay),
        "embedding": (lr_embedding, weight_decay),
        "B": (lr * ratio, weight_decay),
        "B, no decay": (lr * ratio, 0.0),
        "coefficients": (lr, 0.0),
    }
    return [
        {"params": members[name], "lr": its_lr, "weight_decay": decay, "name": name}
        for name, (its_lr, decay) in made.items()
        if members.get(name)
    ]


def _members(model: nn.Module) -> dict[Group, list[nn.Parameter]]:
    """Every trainable parameter in its group, in the order of the model."""
    special: dict[int, Group] = {}
    found = False
    for module, bank in _banks(model):
        found = True
        of_embedding = HOSTS["embedding"] in grafts(module)
        for name, parameter in bank.named_parameters():
            factor = name.rpartition(".")[2]
            if of_embedding:
                special[id(parameter)] = "embedding"
            elif factor in ("lora_A", "lora_B"):
                # One that an embedding shares with its head is that of the embedding.
                special.setdefault(id(parameter), "A" if factor == "lora_A" else "B")
    if not found:
        raise ModelStateError(
            f"this {type(model).__name__} has no adapters",
            hint="put some in with a lowrank rule, or use surgery.parameter_groups",
        )
    for *_, segment in all_segments(model):
        for parameter in segment.topology.parameters():
            special[id(parameter)] = "coefficients"
    members: dict[Group, list[nn.Parameter]] = {}
    for _, parameter in named_parameters(model, duplicates=False):
        if parameter.requires_grad:
            other: Group = "B, no decay" if parameter.dim() < 2 else "A"
            members.setdefault(special.get(id(parameter), other), []).append(parameter)
    if not members:
        raise ModelStateError(
            "no parameter of the model requires a gradient, so there is nothing to train",
            hint="adapters that were frozen train again with requires_grad_(True)",
        )
    return members


def _banks(model: nn.Module) -> Iterator[tuple[nn.Module, Bank]]:
    """Every bank with the module it belongs to; one of several modules with each."""
    for _, module in named_modules(model, duplicates=False):
        child = children(module).get(CHILD)
        if child is None:
            continue
        for _, bank in named_modules(child, duplicates=False):
            if isinstance(bank, Bank):
                yield module, bank


def _check(*, lr: float, ratio: float, weight_decay: float, lr_embedding: float) -> None:
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    for name, value in (("weight_decay", weight_decay), ("lr_embedding", lr_embedding)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be 0 or more, got {value!r}")
