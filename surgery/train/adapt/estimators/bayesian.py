"""iBaML: implicit Bayesian meta-learning (AAAI 2023), with the uncertainty that it gives.

What is meta-learned is a prior N(m, d), diagonal over the parameters. The inner loop fits a
posterior N(m_t, d_t) of the same form to the support set, by gradient descent on::

    E(q) = E_{φ ~ q} L(φ) + w KL(q ‖ prior),        w = kl_weight / N

and the meta-gradient follows from ``∇E = 0`` by the implicit function theorem, with conjugate
gradients preconditioned by the Hessian of the KL term, which is diagonal and known. The draws are
the same for all steps and products of a task, so that E is one function throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from surgery.train.adapt.estimators.base import Estimate, Estimator
from surgery.train.adapt.estimators.conjugate import conjugate_gradients
from surgery.train.adapt.inner import (
    Meta,
    Problem,
    Task,
    Tensors,
    Trace,
    added,
    grad_and_value,
    norm,
    trace_of,
    vjp,
)

_MEAN, _LOG_VARIANCE = "mean:", "log_variance:"
_LOW, _HIGH = -10.0, -9.0
"""Logarithms of the variances start between these, as in the authors' code."""


class Posterior(NamedTuple):
    """What is known of a task's parameters.

    Attributes:
        mean: By parameter, in its shape.
        variance: By parameter, in its shape.
    """

    mean: Tensors
    variance: Tensors


@dataclass(frozen=True)
class Bayesian(Estimator):
    """Learns a prior over parameters, and fits a posterior to each task.

    Attributes:
        kl_weight: w times the number of support samples N.
        draws: Draws of the parameters in training.
        predictive_draws: Draws that a prediction is averaged over.
        solver_steps: Steps of conjugate gradients.
    """

    kl_weight: float = 1e-2
    draws: int = 5
    predictive_draws: int = 10
    solver_steps: int = 5

    def learned(self, parameters: Mapping[str, Tensor], seed: int) -> Tensors:
        """Logarithms of the prior's variances, between -10 and -9, from the seed."""
        generator = torch.Generator().manual_seed(seed)
        return {
            _LOG_VARIANCE + name: torch.empty(p.shape, dtype=p.dtype)
            .uniform_(_LOW, _HIGH, generator=generator)
            .to(p.device)
            for name, p in parameters.items()
        }

    def __call__(self, problem: Problem, meta: Meta, task: Task) -> Estimate:
        """The gradient of the mean query loss over the posterior."""
        noise = _noise(meta.start, self.draws)
        prior = _prior(meta)
        states, trace = self._descended(problem, meta, task.support, noise, problem.steps)
        state = states[-1]

        def query(others: Tensors, state: Tensors) -> Tensor:
            return _expected(problem, others, state, task.query, noise)

        (others, outer), loss = cast(
            "tuple[tuple[Tensors, Tensors], Tensor]",
            grad_and_value(query, (0, 1))(meta.others, state),
        )

        def force(others: Tensors, prior: Tensors, state: Tensors) -> Tensors:
            return self._force(problem, others, prior, state, support=task.support, noise=noise)[0]

        _, pull = vjp(force, meta.others, prior, state)
        x, solved = conjugate_gradients(
            lambda v: pull(v)[2],
            outer,
            steps=self.solver_steps,
            diagonal=_curvature(prior, state, self._weight(task.support)),
        )
        on_others, on_prior, _ = pull(x)
        start = {n: -on_prior[_MEAN + n] for n in meta.start}
        extra = {n: -value for n, value in on_prior.items() if n.startswith(_LOG_VARIANCE)}
        gradient = Meta(start, added(others, on_others, -1.0), extra)
        return Estimate(gradient, loss, trace, solved)

    def walked(
        self, problem: Problem, meta: Meta, support: Tensors, steps: int
    ) -> tuple[list[Tensors], Trace]:
        """Means and logarithms of variances after 0 to ``steps`` inner steps; what was seen."""
        noise = _noise(meta.start, self.draws)
        return self._descended(problem, meta, support, noise, steps)

    def posterior(self, state: Tensors) -> Posterior:
        """What a state says about the parameters."""
        names = [name.removeprefix(_MEAN) for name in state if name.startswith(_MEAN)]
        mean = {name: state[_MEAN + name] for name in names}
        return Posterior(mean, {n: torch.exp(state[_LOG_VARIANCE + n]) for n in names})

    def predicted(
        self,
        problem: Problem,
        meta: Meta,
        state: Tensors,
        predict: Callable[[Tensors], Tensor],
        average: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Predictions averaged over draws from the posterior: (M, ...)."""
        return average(self.drawn(problem, meta, state, predict))

    def drawn(
        self,
        problem: Problem,
        meta: Meta,
        state: Tensors,
        predict: Callable[[Tensors], Tensor],
    ) -> Tensor:
        """Predictions of draws from the posterior: (predictive_draws, M, ...)."""
        noise = _noise(meta.start, self.predictive_draws)
        each = [
            _values(problem, meta.others, state, noise, i) for i in range(self.predictive_draws)
        ]
        return torch.stack([predict(values) for values in each])

    def _weight(self, support: Tensors) -> float:
        return self.kl_weight / len(next(iter(support.values())))

    def _force(
        self,
        problem: Problem,
        others: Tensors,
        prior: Tensors,
        state: Tensors,
        *,
        support: Tensors,
        noise: Tensors,
    ) -> tuple[Tensors, Tensor]:
        """Gradient of E with respect to the state; and E, a scalar."""

        def energy(state: Tensors) -> Tensor:
            expected = _expected(problem, others, state, support, noise)
            return expected + self._weight(support) * _divergence(state, prior)

        return grad_and_value(energy)(state)

    def _descended(
        self, problem: Problem, meta: Meta, support: Tensors, noise: Tensors, steps: int
    ) -> tuple[list[Tensors], Trace]:
        """States after 0 to ``steps`` steps from the prior."""
        prior = _prior(meta)
        states, losses, norms = [prior], list[Tensor](), list[Tensor]()
        for _ in range(steps):
            gradient, energy = self._force(
                problem, meta.others, prior, states[-1], support=support, noise=noise
            )
            losses.append(energy)
            norms.append(norm(gradient))
            states.append(added(states[-1], problem.rule.update({}, gradient), -1.0))
        return states, trace_of(losses, norms, meta.start)


def _prior(meta: Meta) -> Tensors:
    """The prior as a state."""
    return {**{_MEAN + n: value for n, value in meta.start.items()}, **meta.extra}


def _noise(parameters: Mapping[str, Tensor], draws: int) -> Tensors:
    """Standard normal, (draws, *shape) by parameter."""
    return {
        n: torch.randn(draws, *p.shape, dtype=p.dtype, device=p.device)
        for n, p in parameters.items()
    }


def _values(problem: Problem, others: Tensors, state: Tensors, noise: Tensors, i: int) -> Tensors:
    """The i-th draw, as values of the model's parameters."""
    drawn = {
        n: state[_MEAN + n] + torch.exp(0.5 * state[_LOG_VARIANCE + n]) * eps[i]
        for n, eps in noise.items()
    }
    return problem.values(others, drawn)


def _expected(
    problem: Problem, others: Tensors, state: Tensors, samples: Tensors, noise: Tensors
) -> Tensor:
    """Mean loss over the draws, a scalar."""
    draws = len(next(iter(noise.values())))
    losses = [
        problem.loss(_values(problem, others, state, noise, i), samples) for i in range(draws)
    ]
    return torch.stack(losses).mean()


def _divergence(state: Tensors, prior: Tensors) -> Tensor:
    """KL of two diagonal Gaussians, a scalar."""
    terms = list[Tensor]()
    for name in (each.removeprefix(_MEAN) for each in state if each.startswith(_MEAN)):
        apart = state[_LOG_VARIANCE + name] - prior[_LOG_VARIANCE + name]
        moved = state[_MEAN + name] - prior[_MEAN + name]
        whitened = moved.square() * torch.exp(-prior[_LOG_VARIANCE + name])
        terms.append((torch.exp(apart) + whitened - 1 - apart).sum())
    return 0.5 * torch.stack(terms).sum()


def _curvature(prior: Tensors, state: Tensors, weight: float) -> Tensors:
    """Diagonal of the Hessian of the KL term; it has no other entries."""
    found = Tensors()
    for name in (each.removeprefix(_MEAN) for each in state if each.startswith(_MEAN)):
        spread = prior[_LOG_VARIANCE + name]
        found[_MEAN + name] = weight * torch.exp(-spread)
        found[_LOG_VARIANCE + name] = 0.5 * weight * torch.exp(state[_LOG_VARIANCE + name] - spread)
    return found
