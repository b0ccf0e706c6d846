"""LoRA-Pro: no other gradients move the weight nearer to its own, and none less themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from surgery.optim import Factors
from surgery.optim.lora_pro import LoRAPro, adjust, sylvester

SCALING = 1.5


def problem(seed: int = 0, *stack: int) -> tuple[Tensor, ...]:
    """A, B, their gradients and that of the weight."""
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(*stack, 4, 9, generator=draw, dtype=torch.float64)
    B = torch.randn(*stack, 7, 4, generator=draw, dtype=torch.float64)
    G = torch.randn(*stack, 7, 9, generator=draw, dtype=torch.float64)
    return A, B, SCALING * B.mT @ G, SCALING * G @ A.mT, G


def moved(A: Tensor, B: Tensor, new_A: Tensor, new_B: Tensor) -> Tensor:
    return SCALING * (B @ new_A + new_B @ A)


def test_the_weight_moves_along_the_best_that_factors_can_do():
    A, B, grad_A, grad_B, G = problem()
    new_A, new_B = adjust(A, B, grad_A, grad_B, scaling=SCALING)
    on_B = B @ torch.linalg.pinv(B)
    on_A = torch.linalg.pinv(A) @ A
    expected = on_B @ G + (torch.eye(7, dtype=G.dtype) - on_B) @ G @ on_A
    # `delta` is 1e-8 beside eigenvalues of about 1.
    torch.testing.assert_close(moved(A, B, new_A, new_B), expected, rtol=1e-6, atol=1e-6)
    nearest = (expected - G).norm()
    draw = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            other_A = new_A + size * torch.randn(new_A.shape, generator=draw, dtype=A.dtype)
            other_B = new_B + size * torch.randn(new_B.shape, generator=draw, dtype=A.dtype)
            assert (moved(A, B, other_A, other_B) - G).norm() > nearest


def test_of_all_that_move_it_so_the_ones_nearest_to_the_gradients_are_taken():
    A, B, grad_A, grad_B, _ = problem()
    new_A, new_B = adjust(A, B, grad_A, grad_B, scaling=SCALING)

    def distance(X: Tensor) -> Tensor:
        return (new_A + X @ A - grad_A).square().sum() + (new_B - B @ X - grad_B).square().sum()

    X = torch.zeros(4, 4, dtype=A.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(distance(X), X)
    # It is convex in X, and at 0 its slope is none, up to `delta`.
    scale = grad_A.norm() * A.norm()
    assert slope.norm() / scale < 1e-6


def test_sylvester():
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 5, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    left, right = left @ left.mT, right @ right.mT
    X = torch.randn(2, 5, 5, generator=draw, dtype=torch.float64)
    found = sylvester(left, right, left @ X + X @ right, 0.0)
    torch.testing.assert_close(found, X, rtol=1e-9, atol=1e-9)


def test_at_the_start_b_alone_moves():
    A, B, _, grad_B, _ = problem()
    zero_B, zero_grad = torch.zeros_like(B), torch.zeros_like(A)
    new_A, new_B = adjust(A, zero_B, zero_grad, grad_B, scaling=SCALING)
    assert torch.equal(new_A, zero_grad)
    expected = grad_B @ torch.linalg.inv(A @ A.mT) / SCALING**2
    torch.testing.assert_close(new_B, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_rule_gives_every_adapter_what_the_function_gives(stack):
    found, expected = [], []
    for seed in range(3):
        A, B, grad_A, grad_B, _ = problem(seed, *stack)
        each = Factors(f"layer{seed}", nn.Parameter(A), nn.Parameter(B), SCALING + seed)
        each.A.grad, each.B.grad = grad_A.clone(), grad_B.clone()
        found.append(each)
        expected.append(adjust(A, B, grad_A, grad_B, scaling=SCALING + seed))
    optimizer = torch.optim.SGD([p for each in found for p in (each.A, each.B)])
    LoRAPro(found).before(optimizer)
    for each, (new_A, new_B) in zip(found, expected, strict=True):
        torch.testing.assert_close(each.A.grad, new_A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(each.B.grad, new_B, rtol=1e-9, atol=1e-12)


def test_an_option_out_of_range_is_refused():
    with pytest.raises(ValueError, match="delta must be positive"):
        LoRAPro([], delta=0.0)
