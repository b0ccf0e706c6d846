"""RefLoRA-S against golden vectors: factors of equal norms, moments that follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery.errors import ModelStateError
from surgery.optim import Factors
from surgery.optim.reflora_s import RefLoRAS, rescaling

GOLDEN = Path(__file__).parents[1] / "golden" / "reflora_s.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def factors(*stack: int, dtype: torch.dtype = torch.float64) -> Factors:
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(*stack, 4, 9, generator=draw, dtype=torch.float64).to(dtype)
    B = 0.01 * torch.randn(*stack, 7, 4, generator=draw, dtype=torch.float64).to(dtype)
    return Factors("layer", nn.Parameter(A), nn.Parameter(B), 1.0)


def loss_of(each: Factors) -> Tensor:
    target = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    return (each.B @ each.A - target.to(each.A)).square().sum()


def norms(each: Factors) -> list[Tensor]:
    return [torch.linalg.matrix_norm(factor.detach()) for factor in (each.A, each.B)]


@pytest.mark.parametrize("index", range(2))
def test_golden_vectors(index):
    stored = load_file(GOLDEN)
    tensors = {key[2:]: value for key, value in stored.items() if key.startswith(f"{index}.")}
    each = Factors("layer", nn.Parameter(tensors["A"]), nn.Parameter(tensors["B"]), 1.0)
    optimizer = torch.optim.AdamW([each.A, each.B])
    for factor, name in ((each.A, "A"), (each.B, "B")):
        factor.grad = torch.ones_like(factor)
        moments = {moment: tensors[f"{moment}_{name}"].clone() for moment in MOMENTS}
        optimizer.state[factor] = {"step": torch.tensor(1.0), **moments}
    with torch.no_grad():
        RefLoRAS([each], warmup=0).after(optimizer)
    for factor, name in ((each.A, "A"), (each.B, "B")):
        torch.testing.assert_close(factor.detach(), tensors[f"out_{name}"], rtol=1e-9, atol=0)
        for moment in MOMENTS:
            expected = tensors[f"out_{moment}_{name}"]
            found = optimizer.state[factor][moment]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_norms_are_equal_after_each_step_and_the_product_is_that_of_the_step(stack):
    each, plain = factors(*stack), factors(*stack)
    optimizer = torch.optim.SGD([each.A, each.B], lr=1e-3)
    RefLoRAS([each], warmup=1).attach(optimizer)
    loss_of(each).backward()
    optimizer.step()
    other = torch.optim.SGD([plain.A, plain.B], lr=1e-3)
    loss_of(plain).backward()
    other.step()
    # The warm-up leaves the factors as the optimizer made them.
    assert torch.equal(each.A, plain.A)
    optimizer.zero_grad()
    loss_of(each).backward()
    A, B = each.A.detach().clone(), each.B.detach().clone()
    root = rescaling(A, B)[..., None, None]
    # Before the second step the factors are balanced with their gradients, then stepped, then
    # balanced again, which leaves the product.
    stepped = (B / root - 1e-3 * each.B.grad * root) @ (A * root - 1e-3 * each.A.grad / root)
    optimizer.step()
    torch.testing.assert_close(each.B @ each.A, stepped, rtol=1e-12, atol=1e-15)
    norm_A, norm_B = norms(each)
    torch.testing.assert_close(norm_A, norm_B, rtol=1e-12, atol=0)


def test_what_it_starts_from_does_not_matter_but_for_the_product():
    """An optimizer's update is the same whichever multiple of the factors it started from."""
    made = []
    for multiple in (1.0, 32.0):
        each = factors()
        with torch.no_grad():
            each.A.mul_(multiple)
            each.B.div_(multiple)
        optimizer = torch.optim.AdamW([each.A, each.B], lr=1e-2, weight_decay=0.0, eps=0.0)
        RefLoRAS([each], warmup=0).attach(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(each).backward()
            optimizer.step()
        made.append((each.B @ each.A).detach())
    torch.testing.assert_close(*made, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_factor_that_is_zero_is_left_alone(zero):
    each = factors()
    getattr(each, zero).data.zero_()
    optimizer = torch.optim.AdamW([each.A, each.B], lr=0.0)
    RefLoRAS([each], warmup=0).attach(optimizer)
    before = [each.A.detach().clone(), each.B.detach().clone()]
    loss_of(each).backward()
    optimizer.step()
    assert torch.equal(each.A, before[0])
    assert torch.equal(each.B, before[1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_b_leaves_zero_without_a_warm_up(kind):
    each = factors(dtype=torch.float32)
    each.B.data.zero_()
    optimizer = kind([each.A, each.B], lr=0.01)
    RefLoRAS([each], warmup=0).attach(optimizer)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_of(each)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_optimizers_whose_state_cannot_follow_are_refused():
    each = factors()
    with pytest.raises(ModelStateError, match="Adafactor"):
        RefLoRAS([each]).attach(torch.optim.Adafactor([each.A, each.B]))
    with pytest.raises(ValueError, match="interval 1 or more"):
        RefLoRAS([each], interval=0)
