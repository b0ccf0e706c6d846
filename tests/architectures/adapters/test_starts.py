"""PiSSA, OLoRA, NoRA and SORSA: their starts as the papers define them, and as PEFT has them."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import surgery
from architectures.adapters import SORSA, Matrix, Method, NoRA, NoRAPlus, OLoRA, PiSSA
from surgery import LowRank, Rule, adapters
from surgery.errors import ModelStateError
from surgery.registry import STEP_RULES

ROWS, COLUMNS, RANK, SCALING = 9, 7, 3, 1.5


def started(
    cls: type[Method], weight: Tensor, seed: int = 0, **options: Any
) -> tuple[Method, Tensor | None]:
    matrix = Matrix.of(tuple(weight.shape), stacked=weight.dim() > 2)
    adapter = cls(
        matrix, rank=RANK, scaling=SCALING, options=cls.Options(**options), dtype=weight.dtype
    )
    return adapter, adapter.start("kaiming", torch.Generator().manual_seed(seed), weight)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, dtype=torch.float64)


def test_pissa_is_the_principal_part(weight: Tensor) -> None:
    adapter, left = started(PiSSA, weight)
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    principal = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    torch.testing.assert_close(adapter.delta(), principal)
    torch.testing.assert_close(left, weight - principal)
    # Balanced: both factors have (S / s)^½ for Gram matrices' square roots.
    gram = torch.diag(S[:RANK] / SCALING)
    torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.T, gram, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapter.lora_B.T @ adapter.lora_B, gram, rtol=1e-10, atol=1e-10)


def test_olora_is_the_start_of_a_qr_decomposition(weight: Tensor) -> None:
    for each in (weight, weight.T.contiguous()):
        adapter, left = started(OLoRA, each)
        Q, R = torch.linalg.qr(each)
        torch.testing.assert_close(adapter.lora_B.detach(), Q[:, :RANK])
        torch.testing.assert_close(adapter.lora_A.detach(), R[:RANK], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(left, each - SCALING * Q[:, :RANK] @ R[:RANK])


@pytest.mark.parametrize("cls", [NoRA, NoRAPlus])
def test_nora_is_a_sketch_of_the_weight(cls: type[NoRA], weight: Tensor) -> None:
    adapter, left = started(cls, weight, sigma=0.5)
    drawn = torch.randn(RANK, ROWS, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(adapter.lora_A.detach(), 0.5 * drawn @ weight / SCALING)
    assert torch.equal(adapter.lora_B, torch.zeros(ROWS, RANK, dtype=torch.float64))
    assert left is None
    assert cls.Options().sigma == 0.02  # type: ignore[call-arg]
    assert (cls.step_rule in STEP_RULES.names()) == (cls is NoRAPlus)


def test_sorsa_is_three_tensors(weight: Tensor) -> None:
    adapter, left = started(SORSA, weight)
    assert isinstance(adapter, SORSA)
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(adapter.lora_S.detach(), S[:RANK])
    part = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    torch.testing.assert_close(adapter.delta(), SCALING * part)
    torch.testing.assert_close(left, weight - SCALING * part)


def test_sorsa_penalty(weight: Tensor) -> None:
    adapter, _ = started(SORSA, weight)
    penalty = adapter.penalty()
    assert penalty is not None
    assert penalty.item() < 4e-4 * 1e-12
    with torch.no_grad():
        adapter.lora_A.mul_(2)
    penalty = adapter.penalty()
    assert penalty is not None
    # |4 I - I|_F = 3 √r for one of two tensors.
    assert math.isclose(penalty.item(), 4e-4 * 3 * math.sqrt(RANK) / 2, rel_tol=1e-9)
    penalty.backward()
    assert adapter.lora_A.grad is not None
    assert torch.isfinite(adapter.lora_A.grad).all()
    assert torch.isfinite(adapter.lora_B.grad).all()  # type: ignore[arg-type]


def test_gradient_of_the_penalty_is_finite_at_orthonormal_vectors() -> None:
    adapter = SORSA(Matrix.of((4, 4), stacked=False), rank=2, scaling=1.0)
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(2, 4))
        adapter.lora_B.copy_(torch.eye(4, 2))
    penalty = adapter.penalty()
    assert penalty is not None
    penalty.backward()
    assert torch.equal(adapter.lora_A.grad, torch.zeros(2, 4))  # type: ignore[arg-type]


def test_penalty_of_a_model_is_the_mean_over_its_adapters() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    with pytest.raises(ModelStateError, match="has no adapters"):
        adapters.penalty(model)
    options = {"gamma": 1.0}
    surgery.apply(model, Rule(LowRank(method="sorsa", rank=2, options=options)))
    with torch.no_grad():
        dict(model.named_parameters())["1.lowrank.default.lora_A"].mul_(2)
    # One of four tensors, at 3 √2.
    assert math.isclose(adapters.penalty(model).item(), 3 * math.sqrt(2) / 4, rel_tol=1e-9)
    plain = surgery.apply(nn.Sequential(nn.Linear(6, 5)), Rule(LowRank(rank=2)))
    assert adapters.penalty(plain).item() == 0.0


@pytest.mark.parametrize("cls", [PiSSA, OLoRA, SORSA])
def test_factors_of_the_start_are_kept(cls: type[Method], weight: Tensor) -> None:
    adapter, left = started(cls, weight)
    assert left is not None
    A, B = (each.detach().clone() for each in adapter.factors())
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.normal_()
    beginning = adapter.beginning
    assert beginning is not None
    assert torch.equal(beginning.factors()[0], A)
    assert torch.equal(beginning.factors()[1], B)
    assert torch.equal(adapter.without_beginning(weight), left)
    plain_A, plain_B = adapter.plain()
    change = left + adapter.delta() - weight
    torch.testing.assert_close(SCALING * plain_B @ plain_A, change, rtol=1e-10, atol=1e-10)
    assert {*dict(adapter.named_buffers())} == {"initial_A", "initial_B"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [PiSSA, OLoRA, SORSA])
def test_what_is_left_is_rounded_once(cls: type[Method], dtype: torch.dtype) -> None:
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    adapter, left = started(cls, weight)
    assert left is not None
    assert left.dtype == dtype
    A, B = adapter.factors()
    exact = weight.double() - SCALING * B.double() @ A.double()
    # Half a unit in the last place, and the float32 sum before it.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5
    assert ((left.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("method", "options", "theirs"),
    [
        ("pissa", {}, "pissa"),
        ("pissa", {"svd": "randomised"}, "pissa_niter_16"),
        ("olora", {}, "olora"),
    ],
)
def test_starts_as_peft_does(method: str, options: dict[str, Any], theirs: str) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(20, 12))
    ours = copy.deepcopy(stock)
    rule = Rule(LowRank(method=method, rank=3, alpha=6, options=options))
    surgery.apply(ours, rule)
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=theirs, target_modules=["0"])
    other = dict(peft.get_peft_model(copy.deepcopy(stock), config).named_parameters())
    base = other["base_model.model.0.base_layer.weight"]
    # float32 decompositions of another library call; the randomised one is near the exact one.
    close = {"rtol": 1e-4, "atol": 1e-5} if not options else {"rtol": 0.0, "atol": 2e-3}
    torch.testing.assert_close(ours[0].weight, base, **close)
    A = other["base_model.model.0.lora_A.default.weight"]
    B = other["base_model.model.0.lora_B.default.weight"]
    found = dict(ours.named_parameters())
    mine = found["0.lowrank.default.lora_B"] @ found["0.lowrank.default.lora_A"]
    torch.testing.assert_close(mine, B @ A, **close)
