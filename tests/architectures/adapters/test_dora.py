"""DoRA: norms, rows of zeros, dropout, what flows through what, and PEFT's own layer."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from torch import Tensor, nn

import surgery
from architectures.adapters import DoRA, Matrix
from surgery import LowRank, Rule, adapters
from surgery.passes.hosts import bank_of


def made(weight: Tensor, *, rank: int = 3, scaling: float = 1.5) -> DoRA:
    """An adapter of a weight, with every tensor random."""
    matrix = Matrix.of(tuple(weight.shape), stacked=weight.dim() > 2)
    adapter = DoRA(matrix, rank=rank, scaling=scaling, dtype=weight.dtype)
    adapter.start("kaiming", torch.Generator().manual_seed(0), weight)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=0.5)
    return adapter


@pytest.mark.parametrize("shape", [(7, 5), (4, 7, 5)])
def test_rows_have_the_magnitudes_it_learned(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    adapter = made(weight)
    changed = weight + adapter.change(weight)
    norms = changed.norm(dim=-1)
    torch.testing.assert_close(norms, adapter.lora_magnitude_vector.abs(), rtol=1e-12, atol=0)
    direct = weight + 1.5 * adapter.lora_B @ adapter.lora_A
    # The Gram products lose digits only where the change cancels the weight.
    expected = adapter.lora_magnitude_vector / direct.norm(dim=-1)
    torch.testing.assert_close(adapter.gain(weight), expected, rtol=1e-12, atol=0)


def test_starts_as_one_exactly() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = torch.randn(65, 130).to(dtype)
        adapter = DoRA(Matrix.of((65, 130), stacked=False), rank=8, scaling=2.0, dtype=dtype)
        adapter.start("kaiming", torch.Generator().manual_seed(0), weight)
        assert torch.equal(adapter.gain(weight), torch.ones(65, dtype=dtype))


def test_no_gradient_flows_through_the_norm() -> None:
    weight = torch.randn(7, 5, dtype=torch.float64)
    adapter = made(weight)
    probe = torch.randn(7, 5, dtype=torch.float64)
    (adapter.change(weight) * probe).sum().backward()
    A, B = adapter.factors()
    direct = (weight + 1.5 * B @ A).detach()
    norms = direct.norm(dim=-1, keepdim=True)
    gain = adapter.lora_magnitude_vector.detach()[:, None] / norms
    torch.testing.assert_close(adapter.lora_B.grad, 1.5 * (gain * probe) @ A.mT.detach())
    torch.testing.assert_close(adapter.lora_A.grad, 1.5 * B.mT.detach() @ (gain * probe))
    expected = (probe * direct / norms).sum(-1)
    torch.testing.assert_close(adapter.lora_magnitude_vector.grad, expected)


def test_rows_of_zeros_train_and_never_give_nan() -> None:
    layer = nn.Linear(6, 5).double()
    with torch.no_grad():
        layer.weight[2] = 0
    x = torch.randn(4, 6, dtype=torch.float64)
    before = layer(x)
    surgery.apply(layer, Rule(LowRank(method="dora", rank=2)))
    assert torch.equal(layer(x), before)
    optimizer = torch.optim.Adam(adapters.parameters(layer), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - 1).square().sum().backward()
        for tensor in adapters.parameters(layer):
            assert tensor.grad is not None
            assert torch.isfinite(tensor.grad).all()
        optimizer.step()
    bank = bank_of(layer)
    assert bank is not None
    changed = layer.weight + bank.adapters["default"].change(layer.weight)
    assert torch.isfinite(changed).all()
    assert changed[2].abs().max() > 0
    adapters.merge(layer)
    assert torch.isfinite(layer.weight).all()


def test_dropout_leaves_the_scale_of_the_weight_alone() -> None:
    layer = nn.Linear(6, 5).double()
    surgery.apply(layer, Rule(LowRank(method="dora", rank=2, dropout=0.5)))
    bank = bank_of(layer)
    assert bank is not None
    with torch.no_grad():
        # B stays zero: whatever is dropped, the branch adds nothing, and the rows are scaled.
        dict(layer.named_parameters())["lowrank.default.lora_magnitude_vector"].mul_(2)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = 2 * x @ layer.weight.T + layer.bias
    layer.train()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_merged_without_a_copy_comes_out_again_while_the_norms_are_known() -> None:
    layer = nn.Linear(6, 5).double()
    surgery.apply(layer, Rule(LowRank(method="dora", rank=2)))
    with torch.no_grad():
        for tensor in adapters.parameters(layer):
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    stock = layer.weight.detach().clone()
    adapters.merge(layer, {"default": 0.7}, keep_base="none")
    lost = copy.deepcopy(layer)
    adapters.unmerge(layer)
    torch.testing.assert_close(layer.weight.detach(), stock, rtol=1e-12, atol=1e-12)
    bank = bank_of(lost)
    assert bank is not None
    bank.gains = ()  # as after saving
    merged = lost.weight.detach().clone()
    with pytest.raises(surgery.SurgeryError, match="by how much is not"):
        adapters.unmerge(lost)
    assert torch.equal(lost.weight, merged)


def test_rows_scaled_by_zero_are_not_divided_by_it() -> None:
    layer = nn.Linear(6, 5).double()
    surgery.apply(layer, Rule(LowRank(method="dora", rank=2)))
    with torch.no_grad():
        dict(layer.named_parameters())["lowrank.default.lora_magnitude_vector"][1] = 0
    adapters.merge(layer, keep_base="none")
    with pytest.raises(surgery.SurgeryError, match="scaled by zero"):
        adapters.unmerge(layer)


@pytest.mark.parametrize("rslora", [False, True])
def test_computes_what_peft_computes(rslora: bool) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 4))
    x = torch.randn(5, 10)
    ours = copy.deepcopy(stock)
    scaling = "rslora" if rslora else "standard"
    surgery.apply(ours, Rule(LowRank(method="dora", rank=3, alpha=6, scaling=scaling)))
    config = peft.LoraConfig(
        r=3, lora_alpha=6, use_dora=True, use_rslora=rslora, target_modules=["0", "2"]
    )
    theirs = peft.get_peft_model(copy.deepcopy(stock), config)
    other = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in ours.named_parameters():
            if "lowrank" not in name:
                continue
            layer, _, kind = name.partition(".lowrank.default.")
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
            key = f"base_model.model.{layer}.{kind}.default.weight"
            other[key].copy_(tensor)
    # Two layers in float32; they sum in another order.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for name, tensor in ours.named_parameters():
        if "lowrank" in name:
            layer, _, kind = name.partition(".lowrank.default.")
            theirs_grad = other[f"base_model.model.{layer}.{kind}.default.weight"].grad
            torch.testing.assert_close(tensor.grad, theirs_grad, rtol=1e-4, atol=1e-4)
    assert math.isclose(
        next(m.scaling for m in ours.modules() if isinstance(m, DoRA)),
        6 / (3**0.5 if rslora else 3),
    )
