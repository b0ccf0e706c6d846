"""Gradient checkpointing with the switch of the model's own library."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.survival.calls import (
    Case,
    Notes,
    differentiable,
    same,
    same_gradients,
    train,
)


def switch_on(case: Case, model: nn.Module, *, reentrant: bool) -> None:
    """Turn on gradient checkpointing with the switch of the model's own library."""
    match case.subject.library:
        case "transformers":
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        case "diffusers":
            function = partial(checkpoint, use_reentrant=reentrant)
            model.enable_gradient_checkpointing(function if reentrant else None)
        case _:
            from timm.layers import set_reentrant_ckpt

            set_reentrant_ckpt(reentrant)
            model.set_grad_checkpointing(True)


def _recomputations(case: Case, model: nn.Module) -> list[int]:
    """Counts the calls of one layer in a block; filled as the model runs."""
    from transformers.pytorch_utils import Conv1D

    block = model.get_submodule(case.subject.stacks[0].sites[0])
    layer = next(m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d | Conv1D))
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    layer.register_forward_hook(count)
    return calls


def _checkpointed(case: Case, *, reentrant: bool, calls: int) -> Notes:
    model = case.model().train()
    reference = case.reference(model)
    reference.model.train()
    switch_on(case, model, reentrant=reentrant)
    counted = _recomputations(case, model)
    sizes = range(calls)
    found_outputs, found = train(
        model, *(differentiable(case.subject.example(n, quiet=True)) for n in sizes)
    )
    wanted_outputs, wanted = train(
        reference, *(differentiable(case.subject.example(n, quiet=True)) for n in sizes)
    )
    assert counted[0] > calls, f"nothing was recomputed: {counted[0]} calls of a layer"
    same(found_outputs, wanted_outputs)
    same_gradients(found, wanted)
    return {"calls": counted[0]}


def checkpointing(case: Case) -> Notes:
    """Gradient checkpointing, not re-entrant."""
    return _checkpointed(case, reentrant=False, calls=1)


def checkpointing_reentrant(case: Case) -> Notes:
    """Gradient checkpointing, re-entrant."""
    return _checkpointed(case, reentrant=True, calls=1)


def two_forwards(case: Case) -> Notes:
    """Two forwards before one backward: as it is, and checkpointed."""
    model = case.model().train()
    reference = case.reference(model)
    reference.model.train()
    results = [
        train(one, *(differentiable(case.subject.example(n, quiet=True)) for n in (0, 1)))
        for one in (model, reference)
    ]
    same(results[0][0], results[1][0])
    same_gradients(results[0][1], results[1][1])
    return _checkpointed(case, reentrant=False, calls=2)


def two_forwards_reentrant(case: Case) -> Notes:
    """Two forwards before one backward, checkpointed re-entrantly."""
    return _checkpointed(case, reentrant=True, calls=2)
