"""BinomGBML: the meta-gradient as a truncated binomial expansion (arXiv 2604.13263).

The exact meta-gradient ``∏_k (I - A_k) g`` is a sum over subsets of the inner steps, where A_k is
the derivative of the k-th update and g the gradient of the query loss. Truncated backpropagation
keeps some factors whole and drops the others; the binomial estimator keeps **every** product of at
most L factors::

    [I - Σ_k A_k + Σ_{j<k} A_j A_k - ...] g

With u_k^(t) for the same sum over the factors from step k on, of at most t of them::

    u_k^(t) = g - Σ_{j ≥ k} A_j u_{j+1}^(t-1)        u^(0) = g

so that each of the L rounds is a set of independent Hessian-vector products and a sum over them.
Nothing of the inner loop is kept but the states it visited: the products recompute the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from surgery.train.adapt.estimators.base import Estimate, Estimator
from surgery.train.adapt.inner import Meta, Problem, Task, Tensors, added, grad_and_value, vjp


@dataclass(frozen=True)
class Binomial(Estimator):
    """Keeps every product of at most ``terms`` second derivatives.

    ``terms`` 0 is the first-order gradient, as many as inner steps the exact one. For convex losses
    with a step size below 1/H the error is at most C(K, L + 1) (aH)^(L+1) |g|.

    Attributes:
        terms: L; no more than there are inner steps.
        side_by_side: Hessian-vector products that are computed at once, with ``vmap``: more of
            them take fewer, larger calls and more memory. 1 computes one after the other, without
            ``vmap``.
        scale: What every second derivative is multiplied by. Below 1 this is another estimator,
            for step sizes at which the expansion overshoots; the authors' code takes L / K.
    """

    terms: int
    side_by_side: int = 1
    scale: float = 1.0

    def __call__(self, problem: Problem, meta: Meta, task: Task) -> Estimate:
        """The expansion, for everything that is meta-learned.

        Raises:
            ValueError: the inner loop has a proximal term, which the expansion does not cover.
        """
        if problem.proximal:
            raise ValueError("the binomial expansion is of an inner loop without proximal term")
        learned = bool(meta.extra)
        path = problem.path(meta, task.support, problem.steps, states=True, gradients=learned)

        def query(others: Tensors, state: Tensors) -> Tensor:
            return problem.query(others, state, task)

        (others, outer), loss = cast(
            "tuple[tuple[Tensors, Tensors], Tensor]",
            grad_and_value(query, (0, 1))(meta.others, path.states[-1]),
        )
        products = _Products(problem, meta, task.support, self.side_by_side, self.scale)
        sums = cascade(products, path.states, outer, self.terms)
        extra = _rule_gradient(problem, meta.extra, path.gradients, sums.later)
        gradient = Meta(sums.first, added(others, sums.beside, -1.0), extra)
        return Estimate(gradient, loss, path.trace)


class Sums(NamedTuple):
    """The expansion at every step.

    Attributes:
        first: u_0.
        later: u_1 to u_K; empty where only u_0 was needed.
        beside: Σ_k of the pull of u_{k+1} on what does not adapt.
    """

    first: Tensors
    later: list[Tensors]
    beside: Tensors


class Products(Protocol):
    """The factors A_k, transposed, as functions."""

    @property
    def whole(self) -> bool:
        """Whether u_1 to u_K are needed, and not u_0 alone."""
        ...

    def __call__(
        self, states: Sequence[Tensors], rows: Sequence[Tensors], kept: int
    ) -> tuple[list[Tensors], Tensors]:
        """A_k of some consecutive steps on a row each.

        Args:
            states: z_k.
            rows: What each factor is applied to.
            kept: From which of them on the pull on what does not adapt is summed.

        Returns:
            The products; and that sum.
        """
        ...


def cascade(products: Products, states: Sequence[Tensors], outer: Tensors, terms: int) -> Sums:
    """The parallel cascade: L rounds of independent products, each followed by a sum over steps.

    Round t has the steps up to K - t: later ones have no product of t factors behind them, so that
    their rows are final. Where only u_0 is needed, it begins at step L - t: the window moves down.

    Args:
        products: Applies the factors A_k.
        states: z_0 to z_K.
        outer: Gradient of the query loss at z_K, g.
        terms: L; what is beyond K adds nothing.
    """
    steps = len(states) - 1
    terms = min(terms, steps)
    low = 0 if products.whole else max(terms - 1, 0)
    rows, final = [outer] * (steps - low), [outer]
    found, beside = [outer] * (steps + 1), Tensors()
    for done in range(1, terms + 1):
        high = steps - done
        # A pull is itself a second derivative: it is due where a row has all but one of its terms.
        kept = 0 if done == terms else high - low
        pulled, sideways = products(states[low : high + 1], rows, kept)
        beside = sideways if done == 1 else added(beside, sideways)
        found = _less_sums(rows[-1], pulled)
        final.append(found[-1])
        rows = found[1:] if products.whole else found
        low = max(low - 1, 0)
    if not products.whole:
        return Sums(found[0], [], beside)
    later = [final[steps - k] if steps - k <= terms else found[k] for k in range(1, steps + 1)]
    return Sums(found[0], later, beside)


def _less_sums(top: Tensors, products: Sequence[Tensors]) -> list[Tensors]:
    """``top - Σ_{j ≥ i} products_j`` for every i."""
    rows = list[Tensors]()
    row = top
    for product in reversed(products):
        row = added(row, product, -1.0)
        rows.append(row)
    return rows[::-1]


@dataclass(frozen=True)
class _Products:
    """A_k of an inner loop: the step rule times the Hessian times the derivative of the maps."""

    problem: Problem
    meta: Meta
    support: Tensors
    side_by_side: int
    scale: float

    @property
    def whole(self) -> bool:
        return bool(self.meta.others or self.meta.extra)

    def __call__(
        self, states: Sequence[Tensors], rows: Sequence[Tensors], kept: int
    ) -> tuple[list[Tensors], Tensors]:
        if self.side_by_side == 1:
            pairs = [self._one(state, row) for state, row in zip(states, rows, strict=True)]
        else:
            pairs = self._at_once(states, rows)
        beside = Tensors({name: torch.zeros_like(t) for name, t in self.meta.others.items()})
        for sideways, _ in pairs[kept:]:
            beside = added(beside, sideways)
        return [product for _, product in pairs], beside

    def _one(self, state: Tensors, row: Tensors) -> tuple[Tensors, Tensors]:
        """The pull of one row on what does not adapt, and on the state."""
        others, start = self.meta.others, self.meta.start

        def gradient(others: Tensors, state: Tensors) -> Tensors:
            return self.problem.gradient(others, start, state, self.support)[0]

        _, pull = vjp(gradient, others, state)
        return cast("tuple[Tensors, Tensors]", pull(self._transposed(row)))

    def _transposed(self, row: Tensors) -> Tensors:
        """The step rule, transposed and scaled: it is linear, so that any point will do."""
        _, pull = vjp(partial(self.problem.rule.update, self.meta.extra), row)
        transposed: Tensors = pull(row)[0]
        if self.scale == 1:
            return transposed
        return {name: self.scale * value for name, value in transposed.items()}

    def _at_once(
        self, states: Sequence[Tensors], rows: Sequence[Tensors]
    ) -> list[tuple[Tensors, Tensors]]:
        mapped = torch.func.vmap(self._one, chunk_size=self.side_by_side)
        sideways, products = mapped(_stack(states), _stack(rows))
        return list(zip(_split(sideways, len(rows)), _split(products, len(rows)), strict=True))


def _rule_gradient(
    problem: Problem, extra: Tensors, gradients: Sequence[Tensors], later: Sequence[Tensors]
) -> Tensors:
    """``-Σ_k (∂S(g_k)/∂extra)ᵀ u_{k+1}``."""
    total = {name: torch.zeros_like(value) for name, value in extra.items()}
    if not extra:
        return total
    for gradient, row in zip(gradients, later, strict=True):
        _, pull = vjp(partial(problem.rule.update, gradient=gradient), extra)
        total = added(total, pull(row)[0], -1.0)
    return total


def _stack(rows: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _split(stacked: Tensors, count: int) -> list[Tensors]:
    return [{name: tensor[i] for name, tensor in stacked.items()} for i in range(count)]
