"""What the rows of the survival table share: a cell, calls with their gradients, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.sources.examples import Example
from tests.survival.models import Subject
from tests.survival.reference import Column, Reference, coefficients, randomise

#: Largest difference of outputs in float32, relative to the largest value: a few hundred roundings
#: of 6e-8, through blocks that amplify them.
OUTPUTS = 2e-5
#: The same for gradients, relative to the largest of each tensor. Those of a softmax's logits are
#: differences of sums over whole states, which agree in their first digits.
GRADIENTS = 1e-3
#: In float64 what is left is the float32 softmax of the coefficients.
DOUBLE = 1e-6
#: In float64; coefficients and their gradients stay float32.
DOUBLE_GRADIENTS = 1e-5

Notes = dict[str, Any]
Gradients = dict[str, Tensor]


@dataclass
class Case:
    """One cell: a model, its rewrite (None for the model as it is), and the stock model's notes."""

    subject: Subject
    column: Column | None
    stock: Notes = field(default_factory=dict[str, Any])

    def model(self) -> nn.Module:
        """A rewritten model with random coefficients; the stock model where none is asked for."""
        model = self.subject.build()
        if self.column is None:
            return model
        model = rewire(model, self.subject.example(), self.column)
        randomise(model)
        assert coefficients(model), "the rewrite added no coefficient"
        return model

    def reference(self, model: nn.Module) -> Reference:
        """The reference with the coefficients that ``model`` has now."""
        given: dict[str, Tensor] = {name: p.detach() for name, p in coefficients(model).items()}
        return Reference(self.subject, self.column, given, self.subject.build())


def rewire(model: nn.Module, example: Example, column: Column) -> nn.Module:
    """Apply the ``shortcuts`` pass to every stack."""
    options = surgery.Shortcuts(
        topology=column.topology, scope=column.scope, mode=column.mode, init=column.init
    )
    rule = surgery.Rule(options, where=surgery.Stack("all"))
    return surgery.apply(model, rule, example=example)


def leaves(value: Any) -> Iterator[Tensor]:
    """The floating tensors of an output; a cache is none of it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)


def call(model: Callable[..., Any], example: Example, *, seed: int = 0) -> list[Tensor]:
    """The floating tensors of the output; dropout draws the same numbers in every call."""
    torch.manual_seed(seed)
    return list(leaves(model(*example.args, **example.kwargs)))


def still(model: Callable[..., Any], example: Example) -> list[Tensor]:
    """``call`` without gradients."""
    with torch.no_grad():
        return call(model, example)


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A mean over the batch that no normalisation at the end makes constant."""
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for number, output in enumerate(outputs):
        generator = torch.Generator().manual_seed(number)
        weights = torch.randn(output.shape[1:], generator=generator)
        total = total + (output.float() * weights).flatten(1).sum(1).mean() / math.sqrt(
            max(1, weights.numel())
        )
    return total


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where one is not finite."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
    if not wanted.numel():
        return 0.0
    a, b = found.detach().double(), wanted.detach().double()
    worst = float((a - b).abs().max())
    return math.inf if math.isnan(worst) else worst / max(float(b.abs().max()), 1e-3)


def same(found: list[Tensor], wanted: list[Tensor], bound: float = OUTPUTS, what: str = "") -> None:
    """Raise unless two outputs agree within ``bound``; 0 for bit for bit."""
    assert wanted, "no floating tensor in the output"
    assert len(found) == len(wanted), f"{what} {len(found)} tensors instead of {len(wanted)}"
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        off = distance(one, other)
        assert off <= bound, f"{what} tensor {number} of the output differs by {off:.1e}"


def same_gradients(found: Gradients, wanted: Gradients, bound: float = GRADIENTS) -> None:
    """Raise unless the same tensors have gradients and each agrees within ``bound``."""
    assert wanted, "nothing got a gradient"
    lost, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    assert not lost, f"no gradient: {sorted(lost)[:4]}"
    assert not extra, f"a gradient that the reference has not: {sorted(extra)[:4]}"
    overall = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert found[name].shape == gradient.shape, f"{name}: {tuple(found[name].shape)}"
        size = max(float(gradient.abs().max()), 1e-3 * overall)
        off = float((found[name].detach().double() - gradient.double()).abs().max()) / size
        assert off <= bound, f"gradient of {name} differs by {off:.1e}"


def gradients(tensors: Mapping[str, Tensor]) -> Gradients:
    """The gradients that are there, detached from their tensors."""
    return {name: t.grad.detach().clone() for name, t in tensors.items() if t.grad is not None}


def parameters(model: nn.Module | Reference) -> dict[str, Tensor]:
    """Every parameter by its name in the rewritten model."""
    if isinstance(model, Reference):
        return {**dict(model.model.named_parameters()), **model.coefficients}
    return dict(model.named_parameters())


def clear(model: nn.Module | Reference) -> None:
    """Drop all gradients."""
    for parameter in parameters(model).values():
        parameter.grad = None


def train(
    model: nn.Module | Reference,
    *examples: Example,
    through: Callable[..., Any] | None = None,
) -> tuple[list[Tensor], Gradients]:
    """Outputs and gradients of one backward through the calls of all ``examples``.

    Inputs that are leaves with ``requires_grad`` count as ``input …``.
    """
    clear(model)
    runs = model.model if isinstance(model, Reference) else model
    if through is not None:
        runs = through
    outputs = [out for n, example in enumerate(examples) for out in call(runs, example, seed=n)]
    loss_of(outputs).backward()
    found = gradients(parameters(model))
    for number, example in enumerate(examples):
        for name, tensor in _inputs(example).items():
            if tensor.grad is not None:
                found[f"input {name} {number}"] = tensor.grad.detach().clone()
    return [out.detach() for out in outputs], found


def _inputs(example: Example) -> dict[str, Tensor]:
    named = {**{str(i): value for i, value in enumerate(example.args)}, **example.kwargs}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def differentiable(example: Example) -> Example:
    """The same call with fresh floating inputs that require a gradient; positions do not."""

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().clone().requires_grad_(not name.endswith("_ids"))

    return Example(
        tuple(leaf("", value) for value in example.args),
        {name: leaf(name, value) for name, value in example.kwargs.items()},
    )


def embedded(model: nn.Module, example: Example) -> Example:
    """A call with embeddings where the example has token ids, so that inputs have gradients."""
    kwargs: dict[str, Any] = {}
    for name, value in example.kwargs.items():
        if name.endswith("input_ids"):
            table: Any = model.get_input_embeddings()  # type: ignore[operator]
            kwargs[name.replace("input_ids", "inputs_embeds")] = table(value).detach()
        else:
            kwargs[name] = value
    return Example(example.args, kwargs)
