"""The states of one forward pass and their mixing.

The sums of one pass share their states, which a backward can use. Autograd's own would push: each
sum adds its share to the gradient of each of its states, so that with K sites the memory bus
carries K² gradients several times. Here a state *pulls*: it enters through a node, ``tap``, that
autograd runs after every sum the state went into. Each sum has put its gradient aside by then, and
the tap reads each of them once, for the state and for the coefficients together::

    forward    x_j ──tap──► block_j ──► y_j ──mix──► x_{j+1}
                    └─ token ─► every later mix
    backward   mix_k   puts g_{k+1} aside and hands it on to y_k
               tap_j   grad x_j = g + Σ_k W_kj g_{k+1},   grad W_kj = ⟨g_{k+1}, x_j⟩

A token is an empty tensor: nothing flows through it, it makes autograd keep the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from architectures.shortcuts import _torch, kernels
from architectures.shortcuts.kernels import plain

Grads = tuple[Tensor | None, ...]


class History:
    """The states of one forward pass of one stack: a local value, made anew for each pass.

    ``enter`` and ``leave`` alternate, once per site::

        history = History(mixer(), mixer.support)
        for block in blocks:
            x = history.leave(block(history.enter(x)))

    A state is held only while a later site has a coefficient for it.

    Args:
        weights: ``W``, ``(K, K)``, or ``(K, K + 1)`` with the weights of ``y_k`` last.
        support: Per site, the states whose coefficient may differ from zero.
    """

    def __init__(self, weights: Tensor, support: Sequence[Sequence[int]]) -> None:
        self._weights = weights
        self._support = support
        self._sites = len(support)
        self._scaled = weights.shape[1] > self._sites
        self._users = _users(support)
        self._states: dict[int, _State] = {}
        self._site = -1
        self._open = False
        self._columns: tuple[Tensor, ...] | None = None
        self._aside: _Aside | None = None

    def enter(self, x: Tensor, site: int | None = None) -> Tensor:
        """Register the state that enters a site.

        Args:
            x: The state, any shape.
            site: Which one, for a driver that may skip blocks; the next one by default. A state
                that never entered is not mixed.

        Returns:
            What to give the block: equal to ``x``.

        Raises:
            RuntimeError: the last site was not left, there is no such site, or it is not after
                the last one.
        """
        entering = self._site + 1 if site is None else site
        if self._open or not self._site < entering < self._sites:
            raise RuntimeError(
                f"cannot enter site {entering} of {self._sites}: site {self._site} was entered "
                f"last and {'not left yet' if self._open else 'left'} (-1 is none); sites are "
                "entered in order, each once per forward pass"
            )
        self._site = entering
        self._open = True
        users = self._users[entering]
        if not users:
            return x
        if _torch.symbolic(x, self._weights):
            self._states[entering] = _State(x, None, None)
            return x
        return self._tap(x, users)

    def leave(self, y: Tensor) -> Tensor:
        """Mix what the block of the current site gave with the states before it.

        Args:
            y: What the block gave, of the shape of the states.

        Returns:
            ``x_{k+1} = y_k + Σ_j W_kj x_j``.

        Raises:
            RuntimeError: no site was entered, or a state was modified in place since it was
                registered.
            ValueError: a state has another shape than ``y``.
        """
        if not self._open:
            raise RuntimeError("a history cannot leave a site that it did not enter")
        self._open = False
        used = [state for state in self._support[self._site] if state in self._states]
        mixed = self._mix(y, used)
        for state in used:
            if self._users[state][-1] == self._site:
                del self._states[state]
        return mixed

    def _tap(self, x: Tensor, users: Sequence[int]) -> Tensor:
        learned = self._weights.requires_grad
        version = _torch.version(x)
        if not (torch.is_grad_enabled() and (x.requires_grad or learned)):
            self._states[self._site] = _State(x, None, version)
            return x
        if self._aside is None:
            self._aside = _Aside()
        if self._columns is None:
            self._columns = self._weights.unbind(1)
        same, token = _apply(_Tap, x, self._columns[self._site], self._aside, users)
        self._states[self._site] = _State(x, token, version)
        return same if x.requires_grad else x

    def _mix(self, y: Tensor, used: Sequence[int]) -> Tensor:
        states = [self._states[state] for state in used]
        tensors = [state.tensor for state in states]
        for index, state in zip(used, states, strict=True):
            _check(index, state, self._site, y)
        row = self._weights[self._site]
        scale = row[self._sites] if self._scaled else None
        coefficients = _gather(row, used)
        if _torch.symbolic(y, self._weights, *tensors):
            return plain.combine(y, scale, coefficients, tensors)
        if not tensors and scale is None:
            return y
        if any(state.pushes(self._weights) for state in states) or _scattered(y, row, tensors):
            return weighted_sum(y if scale is None else y * scale, coefficients, tensors)
        tokens = [state.token for state in states if state.token is not None]
        aside = self._aside or _Aside()
        return _apply(_Mix, y, scale, aside, self._site, coefficients.detach(), tensors, *tokens)


@dataclass(slots=True)
class _State:
    """A state: its tensor, the token of its tap, and the version it was registered with."""

    tensor: Tensor
    token: Tensor | None
    version: int | None

    def pushes(self, weights: Tensor) -> bool:
        """Whether it needs a gradient and has no tap that would pull one."""
        if self.token is not None or not torch.is_grad_enabled():
            return False
        return self.tensor.requires_grad or weights.requires_grad


class _Aside:
    """Gradients of the sums, kept for the taps of the backward pass that made them."""

    def __init__(self) -> None:
        self._of: dict[int, dict[int, _Kept]] = {}

    def put(self, site: int, gradient: Tensor, readers: int) -> None:
        """Keep the gradient of a sum until ``readers`` taps have read it."""
        backward = _torch.current_backward()
        if backward not in self._of:
            self._of[backward] = {}
            _torch.after_backward(lambda: self._drop(backward))
        self._of[backward][site] = _Kept(gradient, _torch.version(gradient), readers)

    def take(self, site: int) -> Tensor | None:
        """The gradient of a sum in the running backward; None where it had none."""
        kept = self._of.get(_torch.current_backward(), {})
        if site not in kept:
            return None
        entry = kept[site]
        if entry.version != _torch.version(entry.tensor):
            raise RuntimeError(
                f"the gradient of the state after site {site} was modified in place during the "
                "backward pass; a hook or a custom backward must return a new tensor"
            )
        entry.readers -= 1
        if not entry.readers:
            del kept[site]
        return entry.tensor

    def _drop(self, backward: int) -> None:
        self._of.pop(backward, None)


@dataclass(slots=True)
class _Kept:
    tensor: Tensor
    version: int | None
    readers: int


class _Tap(Function):
    """Where a state enters: hands it on, and pulls its gradient in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, column: Tensor, aside: _Aside, users: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, column)
        ctx.aside, ctx.users = aside, users
        same = x.detach()
        if not x.requires_grad:
            ctx.mark_non_differentiable(same)
        return same, column.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        gradient = grads[0]
        found = [(user, ctx.aside.take(user)) for user in ctx.users]
        found = [(user, each) for user, each in found if each is not None]
        if not found:
            return gradient, None, None, None
        x, column = ctx.saved_tensors
        users, gradients = [user for user, _ in found], [each for _, each in found]
        coefficients = _gather(column, users).to(x.device)
        present = () if gradient is None else (gradient,)
        symbolic = torch.is_grad_enabled() or _torch.symbolic(x, *present, *gradients)
        need_x, need_column = ctx.needs_input_grad[:2]
        total, products = (plain if symbolic else kernels).pull(
            x,
            gradient,
            coefficients,
            gradients,
            need_state=need_x,
            need_products=need_column,
        )
        return total, _scatter(products, users, column), None, None


class _Mix(Function):
    """A sum: hands its gradient on to the block, and puts it aside for the taps."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes positional arguments only
        ctx: Any,
        y: Tensor,
        scale: Tensor | None,
        aside: _Aside,
        site: int,
        coefficients: Tensor,
        states: Sequence[Tensor],
        *tokens: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.aside, ctx.site, ctx.tokens, ctx.dtype = aside, site, len(tokens), y.dtype
        ctx.save_for_backward(*(() if scale is None else (y, scale)))
        mixed = kernels.combine(y, scale, coefficients, states)
        ctx.layout = mixed.stride()
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        (gradient,) = grads
        unused = (None,) * (4 + ctx.tokens)
        if gradient is None:
            return None, None, *unused
        symbolic = torch.is_grad_enabled() or _torch.symbolic(gradient)
        if not symbolic and gradient.stride() != ctx.layout:
            # As the states lie, once, and not again in each of the taps.
            empty = torch.empty_strided(
                gradient.shape, ctx.layout, dtype=gradient.dtype, device=gradient.device
            )
            gradient = empty.copy_(gradient)
        if ctx.tokens:
            ctx.aside.put(ctx.site, gradient, ctx.tokens)
        # Once: a non-reentrant checkpoint gives a saved tensor away a single time.
        saved = ctx.saved_tensors
        if not saved:
            return gradient.to(ctx.dtype), None, *unused
        y, scale = saved
        need_y, need_scale = ctx.needs_input_grad[:2]
        total, products = (plain if symbolic else kernels).pull(
            y, None, scale[None], [gradient], need_state=need_y, need_products=need_scale
        )
        return total, None if products is None else products[0], *unused


def weighted_sum(base: Tensor, row: Tensor, states: Sequence[Tensor]) -> Tensor:
    """``base + Σ_j row_j · states_j``, as one node of autograd.

    Sums are made in float32, or float64 where a tensor is, and rounded once.

    Args:
        base: Any shape.
        row: ``(n,)``, the coefficients.
        states: ``n`` tensors of the shape of ``base``.

    Returns:
        A tensor with the shape and memory format of ``base`` and the dtype that torch's
        addition gives.

    Raises:
        ValueError: the shapes or the number of coefficients do not fit.
    """
    if row.shape != (len(states),):
        raise ValueError(f"{len(states)} states and coefficients of shape {tuple(row.shape)}")
    if not states:
        return base
    for index, state in enumerate(states):
        _check_shape(index, state, base)
    row = row.to(base.device)
    states = [state.to(base.device) for state in states]
    if _torch.symbolic(base, row, *states):
        return plain.combine(base, None, row, states)
    return _apply(_Push, base, row, *states)


class _Push(Function):
    """A sum that adds its share to the gradient of each of its states."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, row: Tensor, *states: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(row, *states)
        ctx.dtype = base.dtype
        return kernels.combine(base, None, row, states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        (gradient,) = grads
        row, *states = ctx.saved_tensors
        if gradient is None:
            return (None,) * (2 + len(states))
        need_row, *need_states = ctx.needs_input_grad[1:]
        symbolic = torch.is_grad_enabled() or _torch.symbolic(gradient)
        totals, products = (plain if symbolic else kernels).push(
            gradient, row, states, need_states=need_states, need_products=need_row
        )
        return gradient.to(ctx.dtype), products, *totals


def _apply(function: type[Function], *inputs: object) -> Any:
    return cast("Callable[..., Any]", function.apply)(*inputs)


def _users(support: Sequence[Sequence[int]]) -> list[list[int]]:
    """Per state, the sites that have a coefficient for it, in order."""
    users: list[list[int]] = [[] for _ in support]
    for site, row in enumerate(support):
        for state in row:
            users[state].append(site)
    return users


def _check(index: int, state: _State, site: int, y: Tensor) -> None:
    _check_shape(index, state.tensor, y)
    if state.version is not None and state.version != _torch.version(state.tensor):
        raise RuntimeError(
            f"state {index} was modified in place between the time it entered site {index} and "
            f"its mixing at site {site}, so that what would be mixed is not what entered; the "
            "block must not write into its input (look for `+=`, `add_` or `inplace=True`)"
        )


def _check_shape(index: int, state: Tensor, base: Tensor) -> None:
    if state.shape != base.shape:
        raise ValueError(
            f"state {index} has shape {tuple(state.shape)}, but it is mixed into a tensor of "
            f"shape {tuple(base.shape)}; states that are mixed have one shape"
        )


def _scattered(y: Tensor, row: Tensor, states: Sequence[Tensor]) -> bool:
    """Whether the tensors live on several devices."""
    return row.device != y.device or any(state.device != y.device for state in states)


def _gather(vector: Tensor, indices: Sequence[int]) -> Tensor:
    """``vector[indices]`` without a copy of the indices to the device."""
    if not indices:
        return vector[:0]
    first, last = indices[0], indices[-1]
    if last - first + 1 == len(indices):
        return vector[first : last + 1]
    return torch.stack([vector[index] for index in indices])


def _scatter(values: Tensor | None, indices: Sequence[int], like: Tensor) -> Tensor | None:
    """A vector of the length of ``like`` with ``values`` at ``indices`` and zeros elsewhere."""
    if values is None:
        return None
    values = values.to(like.device, like.dtype)
    first, last = indices[0], indices[-1]
    if last - first + 1 == len(indices):
        return pad(values, (first, len(like) - last - 1))
    spread = [like.new_zeros(()) for _ in range(len(like))]
    for index, value in zip(indices, values.unbind(), strict=True):
        spread[index] = value
    return torch.stack(spread)
