"""AltLoRA against the formulas written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgery.optim import Factors
from surgery.optim.altlora import AltLoRA

SCALING, EPS, LR = 1.5, 1e-4, 0.05


def factors(*stack: int) -> Factors:
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(*stack, 4, 9, generator=draw, dtype=torch.float64)
    B = torch.randn(*stack, 7, 4, generator=draw, dtype=torch.float64)
    return Factors("layer", nn.Parameter(A), nn.Parameter(B), SCALING)


def loss_of(each: Factors, step: int) -> Tensor:
    target = torch.randn(7, 9, generator=torch.Generator().manual_seed(step)).double()
    return (SCALING * each.B @ each.A - target).square().sum() / 2


def inverse(gram: np.ndarray) -> np.ndarray:
    return np.linalg.inv(gram + EPS * np.eye(len(gram)))


class Reference:
    """One adapter, SGD on what AltLoRA makes of the gradients."""

    def __init__(self, A: Tensor, B: Tensor, beta: float, period: int) -> None:
        self.A, self.B = A.detach().numpy().copy(), B.detach().numpy().copy()
        self.beta, self.period, self.step = beta, period, 0
        self.M_A, self.M_B = np.zeros_like(self.A), np.zeros_like(self.B)
        self.A_then, self.B_then = np.zeros_like(self.A), np.zeros_like(self.B)

    def update(self) -> None:
        generator = torch.Generator().manual_seed(self.step)
        G = SCALING * self.B @ self.A - torch.randn(7, 9, generator=generator).double().numpy()
        beta = self.beta
        if self.step // self.period % 2 == 0:
            inv = inverse(self.A @ self.A.T)
            direction = SCALING * G @ self.A.T @ inv / SCALING**2
            carried = self.M_B @ self.A_then @ self.A.T @ inv
            self.M_B = beta * carried + (1 - beta) * direction if beta else direction
            self.A_then = self.A.copy()
            self.B -= LR * self.M_B
        else:
            inv = inverse(self.B.T @ self.B)
            direction = inv @ (SCALING * self.B.T @ G) / SCALING**2
            carried = inv @ self.B.T @ self.B_then @ self.M_A
            self.M_A = beta * carried + (1 - beta) * direction if beta else direction
            self.B_then = self.B.copy()
            self.A -= LR * self.M_A
        self.step += 1


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("period", [1, 2])
def test_steps_are_those_of_the_formulas(beta, period):
    each = factors()
    reference = Reference(each.A, each.B, beta, period)
    optimizer = torch.optim.SGD([each.A, each.B], lr=LR)
    AltLoRA([each], eps=EPS, beta=beta, period=period).attach(optimizer)
    for step in range(7):
        optimizer.zero_grad()
        loss_of(each, step).backward()
        optimizer.step()
        reference.update()
        np.testing.assert_allclose(each.A.detach().numpy(), reference.A, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(each.B.detach().numpy(), reference.B, rtol=1e-9, atol=1e-12)


def test_the_direction_is_the_best_that_one_factor_can_do():
    each = factors()
    G = torch.randn(7, 9, dtype=torch.float64)
    each.A.grad, each.B.grad = SCALING * each.B.detach().mT @ G, SCALING * G @ each.A.detach().mT
    optimizer = torch.optim.SGD([each.A, each.B])
    rule = AltLoRA([each], eps=1e-12, beta=0.0)
    hidden = each.A.grad
    rule.before(optimizer)
    expected = torch.linalg.lstsq(SCALING * each.A.detach().mT, G.mT).solution.mT
    torch.testing.assert_close(each.B.grad, expected, rtol=1e-8, atol=1e-10)
    assert each.A.grad is None
    rule.after(optimizer)
    assert each.A.grad is hidden


def test_the_factor_at_rest_does_not_move_nor_decay():
    each = factors(3)
    optimizer = torch.optim.AdamW([each.A, each.B], lr=LR, weight_decay=0.5)
    rule = AltLoRA([each])
    rule.attach(optimizer)
    for step in range(4):
        moving = rule.moving
        assert moving == "BA"[step % 2]
        before = {"A": each.A.detach().clone(), "B": each.B.detach().clone()}
        optimizer.zero_grad()
        loss_of(each, step).backward()
        optimizer.step()
        assert torch.equal(each.A, before["A"]) == (moving == "B")
        assert torch.equal(each.B, before["B"]) == (moving == "A")
    assert optimizer.state[each.A]["step"] == 2


def test_momentum_travels_in_the_optimizers_state():
    runs = []
    for resumed in (False, True):
        each = factors()
        optimizer = torch.optim.SGD([each.A, each.B], lr=LR)
        attached = AltLoRA([each]).attach(optimizer)
        for step in range(5):
            if resumed and step == 3:
                state = optimizer.state_dict()
                attached.detach()
                optimizer = torch.optim.SGD([each.A, each.B], lr=LR)
                AltLoRA([each]).attach(optimizer)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            loss_of(each, step).backward()
            optimizer.step()
        runs.append((each.A.detach(), each.B.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_b_leaves_zero():
    each = factors()
    each.B.data.zero_()
    optimizer = torch.optim.SGD([each.A, each.B], lr=0.2)
    AltLoRA([each]).attach(optimizer)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(each, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_options_out_of_range_are_refused():
    for options in ({"eps": 0.0}, {"beta": 1.0}, {"period": 0}):
        with pytest.raises(ValueError, match="eps must be positive"):
            AltLoRA([factors()], **options)
