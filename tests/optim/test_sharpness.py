"""SAM and VASSO against their formulas, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from surgery.errors import ConfigError
from surgery.optim.sharpness import STATE, Ascent

RHO = 0.1


def quadratic(parameters: list[nn.Parameter]) -> Tensor:
    """½ wᵀ diag(1, 2, 3, ...) w: its gradient at w + ε is known."""
    flat = torch.cat([p.flatten() for p in parameters])
    return 0.5 * (torch.arange(1, len(flat) + 1, dtype=flat.dtype) * flat**2).sum()


def weights() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=draw))
        for shape in ((2, 3), (2,))
    ]


def stepped(ascent: Ascent, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.zero_grad()
    quadratic(parameters).backward()
    with ascent.climbed():
        quadratic(parameters).backward()
    optimizer.step()


@pytest.mark.parametrize("theta", [1.0, 0.9, 0.3])
def test_steps_are_those_of_the_formula(theta: float):
    parameters = weights()
    optimizer = SGD(parameters, lr=0.05)
    ascent = Ascent(optimizer, rho=RHO, theta=theta)
    w = torch.cat([p.detach().flatten() for p in parameters])
    slopes = torch.arange(1, 9, dtype=torch.float64)
    d: Tensor | None = None
    for _ in range(6):
        g = slopes * w
        d = g if d is None else (1 - theta) * d + theta * g
        w = w - 0.05 * slopes * (w + RHO * d / (d.norm() + 1e-7))
        stepped(ascent, optimizer, parameters)
        found = torch.cat([p.detach().flatten() for p in parameters])
        # The same operations in float64, in another order.
        assert torch.allclose(found, w, rtol=1e-13, atol=0)


def test_sam_keeps_nothing_and_vasso_one_tensor():
    for theta, keys in ((1.0, set()), (0.5, {STATE})):
        parameters = weights()
        optimizer = AdamW(parameters, lr=0.1)
        ascent = Ascent(optimizer, rho=RHO, theta=theta)
        stepped(ascent, optimizer, parameters)
        for parameter in parameters:
            state = optimizer.state[parameter]
            assert state.keys() - {"step", "exp_avg", "exp_avg_sq"} == keys


def test_weights_come_back_in_every_bit_also_after_an_error():
    parameters = weights()
    before = [p.detach().clone() for p in parameters]
    optimizer = SGD(parameters, lr=0.1)
    ascent = Ascent(optimizer, rho=RHO)
    quadratic(parameters).backward()

    def fail() -> None:
        assert not torch.equal(parameters[0], before[0])
        assert parameters[0].grad is None
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"), ascent.climbed():
        fail()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize(
    "made", [lambda p: SGD(p, lr=0.1), lambda p: AdamW(p, lr=0.1, fused=True)], ids=["sgd", "adamw"]
)
def test_a_loaded_state_goes_on_in_every_bit(made: Callable[[Any], Optimizer]):
    whole, parted = weights(), weights()
    optimizer, first = made(whole), made(parted)
    ascent, before = (Ascent(o, rho=RHO, theta=0.5) for o in (optimizer, first))
    for _ in range(3):
        stepped(ascent, optimizer, whole)
        stepped(before, first, parted)
    again = made(parted)
    after = Ascent(again, rho=RHO, theta=0.5)
    again.load_state_dict(first.state_dict())
    for _ in range(3):
        stepped(ascent, optimizer, whole)
        stepped(after, again, parted)
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_a_step_that_is_left_out_leaves_no_trace():
    parameters = weights()
    optimizer = SGD(parameters, lr=0.1)
    ascent = Ascent(optimizer, rho=RHO, theta=0.5)
    stepped(ascent, optimizer, parameters)
    kept = optimizer.state[parameters[0]][STATE].clone()
    with torch.no_grad():
        parameters[0].mul_(2)
    optimizer.zero_grad()
    quadratic(parameters).backward()
    with ascent.climbed():
        pass
    assert torch.equal(optimizer.state[parameters[0]][STATE], kept)


def test_a_gradient_that_is_not_finite_shows_and_is_not_kept():
    parameters = weights()
    optimizer = SGD(parameters, lr=0.0)
    ascent = Ascent(optimizer, rho=RHO, theta=0.5)
    stepped(ascent, optimizer, parameters)
    kept = [optimizer.state[p][STATE].clone() for p in parameters]
    quadratic(parameters).backward()
    parameters[1].grad = torch.full_like(parameters[1], torch.nan)
    with ascent.climbed():
        quadratic(parameters).backward()
    assert not bool(torch.isfinite(parameters[0].grad).all())
    optimizer.step()
    for parameter, last in zip(parameters, kept, strict=True):
        assert torch.equal(optimizer.state[parameter][STATE], last)


def test_a_parameter_without_a_gradient_counts_as_one_with_none_to_give():
    parameters = weights()
    optimizer = AdamW(parameters, lr=0.1)
    ascent = Ascent(optimizer, rho=RHO, theta=0.25)
    stepped(ascent, optimizer, parameters)
    last = optimizer.state[parameters[1]][STATE].clone()
    optimizer.zero_grad()
    quadratic(parameters[:1]).backward()
    with ascent.climbed():
        quadratic(parameters[:1]).backward()
    optimizer.step()
    assert torch.equal(optimizer.state[parameters[1]][STATE], 0.75 * last)


def test_a_parameter_that_never_had_a_gradient_is_left_to_its_optimizer():
    parameters = weights()
    optimizer = AdamW(parameters, lr=0.1)
    ascent = Ascent(optimizer, rho=RHO, theta=0.25)
    quadratic(parameters[:1]).backward()
    with ascent.climbed():
        quadratic(parameters[:1]).backward()
    optimizer.step()
    assert not optimizer.state[parameters[1]]
    stepped(ascent, optimizer, parameters)
    assert "exp_avg" in optimizer.state[parameters[1]]


@pytest.mark.parametrize(("rho", "theta"), [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.0), (0.1, 1.5)])
def test_numbers_out_of_range_are_refused(rho: float, theta: float):
    with pytest.raises(ConfigError, match=r"expected a (positive length|weight in \(0, 1\])"):
        Ascent(SGD(weights(), lr=0.1), rho=rho, theta=theta)
