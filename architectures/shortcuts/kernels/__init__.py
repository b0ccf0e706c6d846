"""Weighted sums of many large tensors, bound by memory traffic and nothing else.

Sums are made in float32, or in float64 where a tensor is, and rounded once. ``plain`` is the
arithmetic in differentiable operations, and what runs where neither of the others can: ``blocked``
serves the CPU, ``fused`` CUDA devices. All three may be called on real tensors only outside of
autograd, except ``plain``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from architectures.shortcuts import _torch
from architectures.shortcuts.kernels import blocked, plain


def combine(
    base: Tensor, scale: Tensor | None, coefficients: Tensor, states: Sequence[Tensor]
) -> Tensor:
    """``scale · base + Σ_i coefficients_i · states_i``.

    Args:
        base: Any shape.
        scale: A scalar, or None for one.
        coefficients: ``(n,)``, on the device of ``base``.
        states: ``n`` tensors of the shape of ``base``.

    Returns:
        A tensor with the memory format of ``base`` and the dtype that torch's addition gives.
    """
    return _for(base).combine(base, scale, coefficients, states)


def pull(
    state: Tensor,
    gradient: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    *,
    need_state: bool = True,
    need_products: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one state and of its coefficients, from those of the sums it went into.

    Args:
        state: ``x``, any shape.
        gradient: What else reaches the gradient of ``x``; None for nothing.
        coefficients: ``(n,)``, on the device of ``state``.
        gradients: One or more gradients of the sums, ``n`` of the shape of ``x``.
        need_state: Whether the first result is needed.
        need_products: Whether the second one is.

    Returns:
        ``gradient + Σ_i coefficients_i · gradients_i`` in the dtype of ``x``, and the
        ``⟨gradients_i, x⟩`` as ``(n,)``; None for what is not needed.
    """
    total, products = _for(state).pull(
        state,
        gradient,
        coefficients,
        gradients,
        need_state=need_state,
        need_products=need_products,
    )
    return total, products


def push(
    gradient: Tensor,
    coefficients: Tensor,
    states: Sequence[Tensor],
    *,
    need_states: Sequence[bool],
    need_products: bool,
) -> tuple[list[Tensor | None], Tensor | None]:
    """What one sum adds to the gradients of its states and of its coefficients.

    Args:
        gradient: That of the sum, any shape.
        coefficients: ``(n,)``, on the device of ``gradient``.
        states: One or more states, ``n`` of the shape of ``gradient``.
        need_states: Per state, whether its gradient is needed.
        need_products: Whether the second result is needed.

    Returns:
        ``coefficients_i · gradient`` in the dtype of each state, and the
        ``⟨gradient, states_i⟩`` as ``(n,)``; None for what is not needed.
    """
    module = _for(gradient)
    if module is not blocked:
        # Each state has a gradient of its own here, so that there is nothing to fuse.
        module = plain
    return module.push(
        gradient, coefficients, states, need_states=need_states, need_products=need_products
    )


def _for(tensor: Tensor) -> ModuleType:
    if tensor.device.type == "cpu":
        return blocked
    if tensor.is_cuda and _torch.has_triton():
        from architectures.shortcuts.kernels import fused

        return fused
    return plain
