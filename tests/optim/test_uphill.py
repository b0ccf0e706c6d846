"""SAM and VASSO with what methods of adapters do around a step, and with GaLore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from surgery.errors import ModelStateError
from surgery.optim.altlora import AltLoRA
from surgery.optim.galore import GaLoreAdamW
from surgery.optim.lora_pro import LoRAPro, adjust
from surgery.optim.nora_plus import NoRAPlus
from surgery.optim.reflora import RefLoRA, precondition
from surgery.optim.reflora_s import RefLoRAS
from surgery.optim.rule import Factors, StepRule
from surgery.optim.scalora import ScaLoRA
from surgery.optim.sharpness import STATE, Ascent

RHO, LR, THETA = 0.1, 1e-3, 0.6
TARGET = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def loss(A: Tensor, B: Tensor) -> Tensor:
    """Of a weight B A, with another curvature in each row."""
    rows = torch.arange(1, 6, dtype=A.dtype)[:, None]
    return 0.5 * (rows * (B @ A - TARGET) ** 2).sum()


def gradients(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.arange(1, 6, dtype=A.dtype)[:, None]
    whole = rows * (B @ A - TARGET)
    return B.T @ whole, whole @ A.T


def factors(scale_of_B: float = 3.0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(2, 4, dtype=torch.float64, generator=draw)
    B = scale_of_B * torch.randn(5, 2, dtype=torch.float64, generator=draw)
    return [nn.Parameter(A), nn.Parameter(B)]


def adapter(A: nn.Parameter, B: nn.Parameter) -> Factors:
    return Factors("fc", A, B, 1.0, fold=torch.zeros_like)


def stepped(ascent: Ascent, optimizer: Optimizer, A: nn.Parameter, B: nn.Parameter) -> None:
    optimizer.zero_grad()
    loss(A, B).backward()
    with ascent.climbed():
        loss(A, B).backward()
    optimizer.step()


def uphill(A: Tensor, B: Tensor, d: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients at the end of an ascent along d."""
    norm = torch.sqrt(d[0].square().sum() + d[1].square().sum()) + 1e-7
    return gradients(A + RHO * d[0] / norm, B + RHO * d[1] / norm)


def balanced(A: Tensor, B: Tensor) -> float:
    return float((B.norm() / A.norm()).sqrt())


def smoothed(last: Sequence[Tensor] | None, new: Sequence[Tensor], theta: float) -> list[Tensor]:
    if last is None:
        return list(new)
    return [(1 - theta) * d + theta * g for d, g in zip(last, new, strict=True)]


def normalised(gram: Tensor) -> Tensor:
    inverse = torch.linalg.inv(gram + 1e-6 * torch.eye(2, dtype=gram.dtype))
    return inverse / inverse.norm()


def by_nora_plus(A: Tensor, B: Tensor, g: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return normalised(B.T @ B) @ g[0], g[1] @ normalised(A @ A.T)


PRECONDITIONED: list[tuple[Callable[..., StepRule], Callable[..., Any]]] = [
    (lambda f: RefLoRA(f, warmup=0), lambda A, B, g: precondition(A, B, *g)),
    (NoRAPlus, by_nora_plus),
]


@pytest.mark.parametrize("theta", [1.0, THETA], ids=["sam", "vasso"])
@pytest.mark.parametrize(("rule", "by_hand"), PRECONDITIONED, ids=["reflora", "nora-plus"])
def test_rules_that_precondition_see_the_factors_at_w_and_the_gradient_uphill(
    rule: Callable[..., StepRule], by_hand: Callable[..., Any], theta: float
):
    A, B = factors()
    a, b = A.detach().clone(), B.detach().clone()
    optimizer = SGD([A, B], lr=LR)
    ascent = Ascent(optimizer, rho=RHO, theta=theta)
    rule([adapter(A, B)]).attach(optimizer)
    d = None
    for _ in range(5):
        stepped(ascent, optimizer, A, B)
        d = smoothed(d, gradients(a, b), theta)
        step = by_hand(a, b, uphill(a, b, d))
        a, b = a - LR * step[0], b - LR * step[1]
        # The same formulas in float64, in another order.
        torch.testing.assert_close(A.detach(), a, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(B.detach(), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("theta", [1.0, THETA], ids=["sam", "vasso"])
def test_the_direction_follows_factors_that_are_balanced(theta: float, warmup: int):
    """What VASSO keeps is of gradients: where a factor is multiplied, it is divided."""
    A, B = factors()
    a, b = A.detach().clone(), B.detach().clone()
    optimizer = SGD([A, B], lr=LR)
    ascent = Ascent(optimizer, rho=RHO, theta=theta)
    RefLoRAS([adapter(A, B)], warmup=warmup).attach(optimizer)
    d = None
    roots: list[float] = []
    for step in range(6):
        stepped(ascent, optimizer, A, B)
        d = smoothed(d, gradients(a, b), theta)
        g = list(uphill(a, b, d))
        if step == warmup:
            # The first balance is of what the step starts from, with the gradients that are there.
            roots.append(balanced(a, b))
            a, b = a * roots[-1], b / roots[-1]
            d, g = [d[0] / roots[-1], d[1] * roots[-1]], [g[0] / roots[-1], g[1] * roots[-1]]
        a, b = a - LR * g[0], b - LR * g[1]
        if step >= warmup:
            roots.append(balanced(a, b))
            a, b = a * roots[-1], b / roots[-1]
            d = [d[0] / roots[-1], d[1] * roots[-1]]
        # As above.
        torch.testing.assert_close(A.detach(), a, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(B.detach(), b, rtol=1e-10, atol=1e-10)
    assert max(roots) > 1.2  # there was something to follow
    if theta < 1:
        for parameter, expected in zip((A, B), d or (), strict=True):
            torch.testing.assert_close(optimizer.state[parameter][STATE], expected)


@pytest.mark.parametrize("rule", [ScaLoRA, LoRAPro, AltLoRA], ids=lambda rule: rule.__name__)
def test_rules_that_need_the_gradient_at_the_factors_are_refused(rule: type[StepRule]):
    A, B = factors()
    optimizer = SGD([A, B], lr=LR)
    Ascent(optimizer, rho=RHO)
    with pytest.raises(ModelStateError, match=rf"{rule.__name__} takes the gradients for .*uphill"):
        rule([adapter(A, B)]).attach(optimizer)
    rule([adapter(A, B)]).attach(SGD([A, B], lr=LR))


def test_why_lora_pro_needs_the_gradient_at_the_factors():
    """Its step is the nearest to that of the weight for gradients of one G, and for no others."""
    A, B = (each.detach() for each in factors())
    d = gradients(A, B)
    norm = torch.sqrt(d[0].square().sum() + d[1].square().sum())
    rows = torch.arange(1, 6, dtype=A.dtype)[:, None]
    G = rows * ((B + RHO * d[1] / norm) @ (A + RHO * d[0] / norm) - TARGET)
    outside_B = torch.eye(5, dtype=A.dtype) - B @ torch.linalg.pinv(B)
    outside_A = torch.eye(4, dtype=A.dtype) - torch.linalg.pinv(A) @ A
    nearest = G - outside_B @ G @ outside_A
    own, other = ((B.T @ G, G @ A.T), uphill(A, B, d))
    moves = [B @ g_A + g_B @ A for g_A, g_B in (adjust(A, B, *own), adjust(A, B, *other))]
    torch.testing.assert_close(moves[0], nearest, rtol=1e-6, atol=1e-6)  # delta is 1e-8
    assert float((moves[1] - nearest).norm() / nearest.norm()) > 0.01


def test_the_ascent_comes_before_the_rules():
    A, B = factors()
    optimizer = SGD([A, B], lr=LR)
    RefLoRA([adapter(A, B)]).attach(optimizer)
    with pytest.raises(ModelStateError, match=r"RefLoRA is around the steps(.|\n)*Ascent first"):
        Ascent(optimizer, rho=RHO)
    climbing = SGD([A, B], lr=LR)
    Ascent(climbing, rho=RHO)
    with pytest.raises(ModelStateError, match="uphill already"):
        Ascent(climbing, rho=RHO)


def test_a_void_step_leaves_no_trace():
    """Also the first one, after which AdamW is to find no state that it has not made."""
    A, B = factors()
    optimizer = AdamW([A, B], lr=LR)
    ascent = Ascent(optimizer, rho=RHO, theta=THETA)
    RefLoRA([adapter(A, B)], warmup=0).attach(optimizer)

    def void() -> None:
        optimizer.zero_grad()
        loss(A, B).backward()
        with ascent.climbed():
            (loss(A, B) * torch.nan).backward()
        optimizer.step()

    before = A.detach().clone()
    void()
    assert torch.equal(A, before)
    assert not optimizer.state.get(A)
    stepped(ascent, optimizer, A, B)
    kept = optimizer.state[A][STATE].clone()
    void()
    assert torch.equal(optimizer.state[A][STATE], kept)


def test_galore_starts_after_a_gradient_of_zero():
    """As behind the gates of a DiT: VASSO's d is there before a projection is."""
    A, B = factors()
    optimizer = GaLoreAdamW([{"params": [A, B], "rank": 2, "gap": 2}], lr=LR)
    ascent = Ascent(optimizer, rho=RHO, theta=THETA)
    before = A.detach().clone()
    (A * 0 + B.sum() * 0).sum().backward()
    with ascent.climbed():
        (A * 0 + B.sum() * 0).sum().backward()
    optimizer.step()
    assert torch.equal(A, before)
    for _ in range(3):
        stepped(ascent, optimizer, A, B)
    assert not torch.equal(A, before)
    assert {"age", "exp_avg", STATE} <= set(optimizer.state[A])


def test_galore_projects_the_gradient_uphill():
    A, B = factors()
    optimizer = GaLoreAdamW([{"params": [B], "rank": 1}, {"params": [A]}], lr=LR)
    ascent = Ascent(optimizer, rho=RHO)
    d = gradients(A.detach(), B.detach())
    _, expected = uphill(A.detach(), B.detach(), d)
    _, plain = gradients(A.detach(), B.detach())
    stepped(ascent, optimizer, A, B)
    basis = optimizer.state[B]["right"][0]
    for found, agrees in ((expected, True), (plain, False)):
        first = torch.linalg.svd(found)[2][0]
        # The angle between both is about ρ, which is far above rounding.
        assert (abs(float(first @ basis)) > 1 - 1e-9) == agrees
