"""The inner loop: a few gradient steps from meta-learned parameters to a task's own.

Everything here is a pure function of tensors by name, so that it can be differentiated, mapped
over tasks with ``torch.func.vmap``, or called in a loop. With z the parameters that adapt, T the
model's mirror maps (the identity where there are none), L the loss of a task's support set and S
the step rule::

    φ_k = T(z_k)        z_{k+1} = z_k - S(∇L(φ_k) + λ (z_k - z_0))

The gradient is taken at the mapped values and applied to the dual ones without the Jacobian of T:
mirror descent (arXiv 2312.13486). λ is zero but for the implicit estimators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from surgery.train.adapt.rules import StepRule

#: Tensors by name.
Tensors = dict[str, Tensor]


class Meta(NamedTuple):
    """What is meta-learned.

    Attributes:
        start: What every task starts from, by parameter: z_0.
        others: Parameters of the model that do not adapt: those of mirror maps, layers outside
            the inner loop.
        extra: What the step rule or the estimator learns beside the model, such as step sizes.
    """

    start: Tensors
    others: Tensors
    extra: Tensors

    def map(self, function: Callable[[Tensor], Tensor]) -> Meta:
        """The same with a function of each tensor in its place."""
        return Meta(*({name: function(t) for name, t in part.items()} for part in self))


class Task(NamedTuple):
    """One task: what is adapted on, and what the result is judged by.

    Attributes:
        support: Samples by name, (N, ...) each.
        query: Samples by name, (M, ...) each.
    """

    support: Tensors
    query: Tensors


class Trace(NamedTuple):
    """What an inner loop of K steps saw.

    Attributes:
        losses: Support loss before each step, (K,).
        norms: Norm of the gradient of each step, (K,).
    """

    losses: Tensor
    norms: Tensor


class Path(NamedTuple):
    """An inner loop of K steps, as constants.

    Attributes:
        states: z_0 to z_K; only the last one where the others were not asked for.
        gradients: What the rule was given at each step; empty where it was not asked for.
        total: Sum of those gradients.
        trace: What the loop saw.
    """

    states: list[Tensors]
    gradients: list[Tensors]
    total: Tensors
    trace: Trace


@dataclass(frozen=True)
class Problem:
    """Model, loss and step rule of an inner loop.

    Attributes:
        loss: Values of the model's parameters and samples → mean loss, a scalar.
        rule: What a step does with a gradient.
        steps: Inner steps, K.
        primal: Dual values of the parameters → the values that the model uses; pure.
        proximal: λ, the pull back to the start.
    """

    loss: Callable[[Tensors, Tensors], Tensor]
    rule: StepRule
    steps: int
    primal: Callable[[Tensors], Tensors] = dict
    proximal: float = 0.0

    def values(self, others: Tensors, state: Tensors) -> Tensors:
        """The values that the model uses: T of the state, beside what does not adapt."""
        return self.primal({**others, **state})

    def query(self, others: Tensors, state: Tensors, task: Task) -> Tensor:
        """Loss of an adapted state on the query set, a scalar."""
        return self.loss(self.values(others, state), task.query)

    def gradient(
        self, others: Tensors, start: Tensors, state: Tensors, support: Tensors
    ) -> tuple[Tensors, Tensor]:
        """Gradient at the mapped values, with the pull to the start; and the loss, a scalar."""
        values = self.values(others, state)
        moved = {name: values[name] for name in state}

        def loss(moved: Tensors) -> Tensor:
            return self.loss({**values, **moved}, support)

        found, value = grad_and_value(loss)(moved)
        if self.proximal:
            found = {n: g + self.proximal * (state[n] - start[n]) for n, g in found.items()}
        return found, value

    def moved(self, extra: Tensors, state: Tensors, gradient: Tensors) -> Tensors:
        """The state after a step along a gradient."""
        update = self.rule.update(extra, gradient)
        return {name: value - update[name] for name, value in state.items()}

    def unrolled(
        self, meta: Meta, state: Tensors, support: Tensors, steps: int
    ) -> tuple[Tensors, Trace]:
        """The state after some steps, as a differentiable function of ``meta`` and ``state``."""
        losses, norms = list[Tensor](), list[Tensor]()
        for _ in range(steps):
            gradient, loss = self.gradient(meta.others, meta.start, state, support)
            losses.append(loss.detach())
            norms.append(norm(gradient).detach())
            state = self.moved(meta.extra, state, gradient)
        return state, trace_of(losses, norms, state)

    def path(
        self,
        meta: Meta,
        support: Tensors,
        steps: int,
        *,
        states: bool = False,
        gradients: bool = False,
    ) -> Path:
        """Walk from the start without keeping any graph.

        Args:
            meta: Without gradients.
            support: The support set.
            steps: How many steps.
            states: Whether every state is kept, for those who look back at them.
            gradients: Whether the gradient of every step is kept.
        """
        state = meta.start
        visited, seen = [state], list[Tensors]()
        losses, norms = list[Tensor](), list[Tensor]()
        total = {name: torch.zeros_like(value) for name, value in state.items()}
        for _ in range(steps):
            gradient, loss = self.gradient(meta.others, meta.start, state, support)
            losses.append(loss)
            norms.append(norm(gradient))
            total = {name: value + gradient[name] for name, value in total.items()}
            state = self.moved(meta.extra, state, gradient)
            visited = [*visited, state] if states else [state]
            if gradients:
                seen.append(gradient)
        return Path(visited, seen, total, trace_of(losses, norms, state))


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm over all tensors, a scalar."""
    return torch.sqrt(torch.stack([value.square().sum() for value in tensors.values()]).sum())


def dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Inner product over all tensors, a scalar."""
    return torch.stack([(value * other[name]).sum() for name, value in one.items()]).sum()


def added(one: Mapping[str, Tensor], other: Mapping[str, Tensor], scale: float = 1.0) -> Tensors:
    """``one + scale · other``, by name; what only ``one`` has stays."""
    return {n: v + scale * other[n] if n in other else v for n, v in one.items()}


def grad_and_value(
    function: Callable[..., Tensor], argnums: int | tuple[int, ...] = 0
) -> Callable[..., tuple[Tensors, Tensor]]:
    """``torch.func.grad_and_value``, with types."""
    return cast(
        "Callable[..., tuple[Tensors, Tensor]]", torch.func.grad_and_value(function, argnums)
    )


def vjp(
    function: Callable[..., Tensors], *at: Tensors
) -> tuple[Tensors, Callable[[Tensors], tuple[Tensors, ...]]]:
    """``torch.func.vjp``, with types: the value, and what pulls a cotangent back.

    What is pulled back carries no graph of its own: nothing here is differentiated a third time.
    """
    value, pull = cast("Any", torch.func.vjp)(function, *at)
    return value, partial(pull, create_graph=False)


def trace_of(losses: list[Tensor], norms: list[Tensor], state: Tensors) -> Trace:
    """The trace of an inner loop, which may have had no step.

    Args:
        losses: Of each step, a scalar.
        norms: Of each step, a scalar.
        state: Says where and what the trace of no step is.
    """
    if not losses:
        empty = next(iter(state.values())).new_zeros(0)
        return Trace(empty, empty)
    return Trace(torch.stack(losses), torch.stack(norms))
