"""Plain calls: eager mode, shapes, dropout, gradients, what a model gives out and generates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgery.sources.examples import Example
from tests.survival.calls import (
    DOUBLE,
    DOUBLE_GRADIENTS,
    GRADIENTS,
    OUTPUTS,
    Case,
    Notes,
    call,
    differentiable,
    distance,
    embedded,
    leaves,
    same,
    same_gradients,
    still,
    train,
)
from tests.survival.reference import Reference, coefficients


def eager(case: Case) -> Notes:
    """Outputs in float32 and float64, and the states between, equal the reference."""
    model = case.model()
    reference = case.reference(model)
    example = case.subject.example()
    same(still(model, example), still(reference.model, example))
    if case.column is not None:
        stock = still(case.subject.build(), example)
        moved = max(map(distance, still(model, example), stock))
        assert moved > 100 * OUTPUTS, f"the rewrite changes the output by {moved:.1e} only"
    if not case.subject.double:
        return {"float64": False}
    double = example.to(dtype=torch.float64)
    model, reference.model = model.double(), reference.model.double()
    same(still(model, double), still(reference.model, double), DOUBLE, "in float64")
    return {"float64": True}


def shapes(case: Case) -> Notes:
    """Another batch size and length, then the first again."""
    model = case.model()
    reference = case.reference(model)
    for number in (1, 0, 1):
        example = case.subject.example(number)
        same(still(model, example), still(reference.model, example))
    return {}


def dropout(case: Case) -> Notes:
    """Train mode draws the same numbers from the same seed."""
    model = case.model().train()
    reference = case.reference(model)
    reference.model.train()
    for number in (0, 1):
        example = case.subject.example(number, quiet=True)
        found = call(model, example, seed=number)
        wanted = call(reference.model, example, seed=number)
        same(found, wanted)
    same(list(_running(model)), list(_running(reference.model)))
    assert _is_random(model, case) is case.subject.random
    return {}


def _running(model: nn.Module) -> Iterator[Tensor]:
    """The statistics that train mode updates; and one tensor for models that have none."""
    yield torch.zeros(1)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield buffer


def _is_random(model: nn.Module, case: Case) -> bool:
    """Whether some seeds give different results: a few low drop rates may draw alike from two."""
    example = case.subject.example(quiet=True)
    first, *others = (call(copy.deepcopy(model), example, seed=seed) for seed in range(8))
    return any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def all_gradients(case: Case) -> Notes:
    """Of all parameters, coefficients and inputs, in train mode with dropout."""
    model = case.model()
    reference = case.reference(model)
    plain = case.subject.example(quiet=True)
    bound = GRADIENTS
    if case.subject.double:
        plain, bound = plain.to(dtype=torch.float64), DOUBLE_GRADIENTS
        model, reference.model = model.double(), reference.model.double()
    examples = [plain]
    if case.subject.library == "transformers" and "input_ids" in plain.kwargs:
        examples.append(embedded(model, plain))
    for mode in (True, False):
        model.train(mode)
        reference.model.train(mode)
        for example in examples:
            _, found = train(model, differentiable(example))
            _, wanted = train(reference, differentiable(example))
            same_gradients(found, wanted, bound)
    assert any(name.startswith("input ") for name in wanted), "no input got a gradient"
    silent = [n for n in coefficients(model) if n not in found]
    assert not silent, f"no gradient: {silent}"
    return {}


def generation(case: Case) -> Notes:
    """Greedy generation with a cache gives the tokens and logits of generation without."""
    model = case.model()
    reference = case.reference(model)
    example = case.subject.example()
    tokens = {"input_ids": example.kwargs["input_ids"]}
    mask = torch.ones_like(tokens["input_ids"])
    mask[-1, :2] = 0  # the second text is shorter: padded on the left
    asked: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    cached = model.generate(**tokens, **asked, use_cache=True)
    uncached = model.generate(**tokens, **asked, use_cache=False)
    wanted = reference.model.generate(**tokens, **asked, use_cache=False)
    for found in (cached, uncached):
        same(list(found.logits), list(wanted.logits))
        assert torch.equal(found.sequences, wanted.sequences)
    return {}


def hidden_states(case: Case) -> Notes:
    """The states a model gives out are those after mixing."""
    model = case.model()
    reference = case.reference(model)
    if case.subject.library == "timm":
        return _intermediates(case, model, reference)
    example = case.subject.example()
    asked = Example((), {**example.kwargs, "output_hidden_states": True})
    with torch.no_grad():
        found, wanted = (one(**asked.kwargs) for one in (model, reference.model))
    for number, key in enumerate(_state_keys(case)):
        states = list(found[key])
        assert len(states) == len(case.subject.stacks[number].sites) + 1
        if reference.mixtures and _by_block(case):
            # The last is the state after the last normalisation.
            same(states[:-1], reference.mixtures[number].states[0])
        same(states, list(wanted[key]))
    if len(_state_keys(case)) == 1:
        with torch.no_grad():
            some = model(**{**asked.kwargs, "output_hidden_states": [1, -1]}).hidden_states
        kept = [number for number, state in enumerate(some) if state is not None]
        assert kept == [1, len(states) - 1], f"states {kept} were selected"
        same([some[number] for number in kept], [states[number] for number in kept])
    return {}


def _by_block(case: Case) -> bool:
    return case.column is not None and case.column.scope == "block"


def _state_keys(case: Case) -> list[str]:
    if len(case.subject.stacks) == 2:
        return ["encoder_hidden_states", "decoder_hidden_states"]
    return ["hidden_states"]


def _intermediates(case: Case, model: nn.Module, reference: Reference) -> Notes:
    """timm's ``forward_intermediates``, also where it stops at one of them."""
    x = case.subject.example().args[0]
    for options in ({}, {"indices": [1], "stop_early": True}):
        with torch.no_grad():
            found, wanted = (
                list(leaves(one.forward_intermediates(x, **options)))
                for one in (model, reference.model)
            )
        same(found, wanted)
    return {"states": len(wanted)}
