"""ScaLoRA around the steps of an optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.errors import ModelStateError
from surgery.optim import scalora
from surgery.optim.rule import Factors
from surgery.optim.scalora import ScaLoRA, column_scaling

RANK = 3


class Layer(nn.Module):
    """``W + s B A`` with W frozen; one or a stack."""

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        seed: int = 0,
        scaling: float = 1.0,
        stack: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float64,
        base_dtype: torch.dtype | None = None,
        zero: bool = True,
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        W = torch.randn(*stack, rows, columns, generator=draw) / math.sqrt(columns)
        A = torch.randn(*stack, RANK, columns, generator=draw) / math.sqrt(columns)
        B = torch.randn(*stack, rows, RANK, generator=draw) * (0.0 if zero else 0.3)
        self.W = nn.Parameter(W.to(base_dtype or dtype), requires_grad=False)
        self.A, self.B = nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))
        self.scaling = scaling

    @property
    def whole(self) -> Tensor:
        return self.W.to(self.A.dtype) + self.scaling * self.B @ self.A

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.whole.mT

    @torch.no_grad()
    def fold(self, change: Tensor) -> Tensor:
        before = self.W.to(change.dtype)
        self.W.copy_(before + change)
        return change - (self.W.to(change.dtype) - before)

    def factors(self, name: str) -> Factors:
        return Factors(name, self.A, self.B, self.scaling, self.fold, self.W.dtype)


def ruled(
    layers: list[Layer], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **options: Any
) -> tuple[torch.optim.Optimizer, ScaLoRA]:
    optimizer = make([p for layer in layers for p in (layer.A, layer.B)])
    rule = ScaLoRA([each.factors(f"layer{i}") for i, each in enumerate(layers)], **options)
    rule.attach(optimizer)
    return optimizer, rule


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


def regress(layers: list[Layer], step: int) -> Tensor:
    """The loss of a two-layer network whose target is of full rank."""
    draw = torch.Generator().manual_seed(1000 + step)
    width = layers[0].A.shape[-1]
    x = torch.randn(64, width, generator=draw).to(layers[0].A.dtype)
    target = torch.randn(64, layers[-1].W.shape[-2], generator=torch.Generator().manual_seed(7))
    goal = Layer(24, width, seed=99, dtype=x.dtype)(x).tanh() @ target[:24].to(x.dtype)
    for layer in layers[:-1]:
        x = layer(x).tanh()
    return functional.mse_loss(layers[-1](x), goal)


def train(layers: list[Layer], optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = regress(layers, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def linear_gradients(layer: Layer, G: Tensor) -> tuple[Tensor, Tensor]:
    """Those of ⟨G, W'⟩, computed by autograd."""
    layer.zero_grad()
    (G * layer.whole).sum().backward()
    assert layer.A.grad is not None
    assert layer.B.grad is not None
    return layer.A.grad, layer.B.grad


@pytest.mark.parametrize("stack", [(), (2, 3)])
@pytest.mark.parametrize("scaling", [1.0, 0.5])
def test_a_swap_leaves_the_weight_and_gives_the_gradients_of_the_new_factors(
    scaling: float, stack: tuple[int, ...]
):
    layer = Layer(7, 5, scaling=scaling, stack=stack, zero=False)
    other = Layer(9, 6, seed=1, scaling=scaling, zero=False)
    optimizer, rule = ruled([layer, other], adamw, lipschitz=20.0)
    G = torch.randn(layer.W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    linear_gradients(layer, G)
    linear_gradients(other, torch.ones_like(other.W))
    before = (layer.whole.detach(), layer.A.detach().clone(), layer.B.detach().clone())
    alpha, beta, kinds = column_scaling(
        layer.A, layer.B, layer.A.grad, layer.B.grad, lipschitz=20.0, lr=1e-2, scaling=scaling
    )
    rule.before(optimizer)
    assert not torch.equal(layer.B, before[2])
    torch.testing.assert_close(layer.whole, before[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.B.detach(), before[2] * alpha.unsqueeze(-2))
    torch.testing.assert_close(layer.A.detach(), before[1] * beta.unsqueeze(-1))
    assert rule.kinds["layer0"] == (kinds if stack else (kinds,))
    given = layer.A.grad.clone(), layer.B.grad.clone()
    expected = linear_gradients(layer, G)
    torch.testing.assert_close(given[0], expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(given[1], expected[1], rtol=1e-12, atol=1e-14)


def test_moments_become_those_of_the_new_factors_gradients():
    layer = Layer(7, 5, zero=False)
    optimizer, rule = ruled([layer], adamw, lipschitz=20.0, warmup=1)
    linear_gradients(layer, torch.ones_like(layer.W))
    optimizer.step()
    state = {name: copy.deepcopy(optimizer.state[getattr(layer, name)]) for name in "AB"}
    gradients = linear_gradients(layer, torch.randn_like(layer.W))
    alpha, beta, _ = column_scaling(layer.A, layer.B, *gradients, lipschitz=20.0, lr=1e-2)
    rule.before(optimizer)
    for name, factor in (("A", alpha[:, None]), ("B", beta)):
        now = optimizer.state[getattr(layer, name)]
        torch.testing.assert_close(now["exp_avg"], state[name]["exp_avg"] * factor)
        torch.testing.assert_close(now["exp_avg_sq"], state[name]["exp_avg_sq"] * factor**2)
        assert now["step"] == 1


def test_the_sum_of_the_steps_has_more_than_the_adapters_rank():
    changes, losses = {}, {}
    for name in ("lora", "scalora"):
        layers = [Layer(24, 16, seed=1), Layer(20, 24, seed=2)]
        start = [layer.whole.detach() for layer in layers]
        if name == "lora":
            optimizer = adamw([p for layer in layers for p in (layer.A, layer.B)])
        else:
            optimizer, rule = ruled(layers, adamw)
        losses[name] = train(layers, optimizer, range(150))
        changes[name] = [
            torch.linalg.svdvals(layer.whole.detach() - before)
            for layer, before in zip(layers, start, strict=True)
        ]
    above = {
        name: [int((values > 1e-3 * values[0]).sum()) for values in found]
        for name, found in changes.items()
    }
    assert above["lora"] == [RANK, RANK]
    assert min(above["scalora"]) > 2 * RANK
    assert losses["scalora"][-1] < losses["scalora"][0]
    assert rule.steps == 150


@pytest.mark.parametrize(("interval", "warmup"), [(1, 0), (1, 3), (4, 0), (4, 3)])
def test_interval_and_warmup_say_which_steps_scale(interval: int, warmup: int):
    layer = Layer(24, 16, zero=False)
    optimizer, _ = ruled([layer], adamw, interval=interval, warmup=warmup)
    changed = []
    for step in range(10):
        before = layer.W.clone()
        train([layer], optimizer, range(step, step + 1))
        changed.append(not torch.equal(layer.W, before))
    assert changed == [step >= warmup and (step - warmup) % interval == 0 for step in range(10)]


def test_without_a_given_smoothness_the_first_scaling_keeps_the_norm():
    layer = Layer(24, 16)
    optimizer, rule = ruled([layer], adamw)
    train([layer], optimizer, range(1))
    assert rule.kept["layer0"]["lipschitz"].isnan()  # B was zero
    regress([layer], 1).backward()
    norm = layer.A.square().sum() + layer.B.square().sum()
    rule.before(optimizer)
    torch.testing.assert_close(layer.A.square().sum() + layer.B.square().sum(), norm)
    first = rule.kept["layer0"]["lipschitz"].clone()
    assert first > 0
    train([layer], optimizer, range(2, 6))
    assert torch.equal(rule.kept["layer0"]["lipschitz"], first)


def test_a_schedule_that_goes_to_zero_does_not_blow_the_factors_up():
    """α² is one over the learning rate: it is the schedule's peak that counts."""
    layer = Layer(24, 16)
    optimizer, _ = ruled([layer], adamw, lipschitz=300.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5 * (step < 10))
    norms = []
    for step in range(20):
        train([layer], optimizer, range(step, step + 1))
        schedule.step()
        norms.append(max(layer.A.norm().item(), layer.B.norm().item()))
    assert max(norms) < 3 * norms[6]
    assert all(math.isfinite(norm) for norm in norms)


def test_a_learning_rate_of_zero_means_no_scaling():
    layer = Layer(24, 16, zero=False)
    optimizer, rule = ruled([layer], lambda p: torch.optim.SGD(p, lr=0.0), lipschitz=300.0)
    before = layer.W.clone(), layer.A.detach().clone()
    train([layer], optimizer, range(2))
    assert torch.equal(layer.W, before[0])
    assert torch.equal(layer.A, before[1])
    assert rule.kinds == {}


def test_factors_with_learning_rates_of_their_own_are_scaled_for_their_own():
    """As in LoRA+. The term of α is the step on A."""
    layer = Layer(7, 5, zero=False)
    optimizer = torch.optim.SGD(
        [{"params": [layer.A], "lr": 1e-2}, {"params": [layer.B], "lr": 4e-2}]
    )
    rule = ScaLoRA([layer.factors("layer")], lipschitz=20.0)
    gradients = linear_gradients(layer, torch.ones_like(layer.W) + torch.eye(7, 5))
    one = column_scaling(layer.A, layer.B, *gradients, lipschitz=20.0, lr=1e-2)
    before = layer.A.detach().clone(), layer.B.detach().clone()
    rule.before(optimizer)
    torch.testing.assert_close(layer.B.detach(), before[1] * one[0])
    torch.testing.assert_close(layer.A.detach(), before[0] * one[1][:, None] / 2)


def test_a_narrow_base_takes_in_changes_below_its_last_bit():
    """After 300 folds it is their exact sum, rounded about once."""
    layer = Layer(24, 16, dtype=torch.float32, base_dtype=torch.bfloat16)
    optimizer, rule = ruled([layer], adamw)
    lost = rule.kept["layer0"]["lost"]
    assert lost.dtype == torch.bfloat16
    exact, forgetful = layer.W.double(), layer.W.clone()

    def spied(change: Tensor) -> Tensor:
        nonlocal exact, forgetful
        own = change.double() - lost.double()  # what is handed over holds what the last fold lost
        exact, forgetful = exact + own, (forgetful.double() + own).bfloat16()
        return layer.fold(change)

    rule.factors = (Factors("layer0", layer.A, layer.B, 1.0, spied, torch.bfloat16),)
    train([layer], optimizer, range(300))
    unit = 2.0**-8
    # What is kept is rounded as well, 300 times, to the unit's square.
    bound = unit * exact.abs() + 5 * math.sqrt(300) * unit**2 * exact.abs().max()
    error = (layer.W.double() - exact).abs()
    assert (error <= bound).all()
    assert error.norm() < (forgetful.double() - exact).norm() / 4


@pytest.mark.parametrize("elements", [1, 100, 2**22])
def test_narrow_factors_fold_what_their_rounding_loses(
    elements: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scalora, "_AT_A_TIME", elements)
    layer = Layer(24, 16, dtype=torch.bfloat16, base_dtype=torch.float32, zero=False, scaling=0.7)
    optimizer, rule = ruled([layer], adamw, lipschitz=300.0)
    layer.A.grad, layer.B.grad = torch.randn_like(layer.A), torch.randn_like(layer.B)
    before = layer.W.double() + 0.7 * layer.B.double() @ layer.A.double()
    rule.before(optimizer)
    after = layer.W.double() + 0.7 * layer.B.double() @ layer.A.double()
    # Far below the 4e-3 of bfloat16.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_gives_the_same_bits(base_dtype: torch.dtype):
    def fresh() -> tuple[list[Layer], torch.optim.Optimizer, ScaLoRA]:
        layers = [
            Layer(24, 16, seed=1, dtype=torch.float32, base_dtype=base_dtype),
            Layer(20, 24, seed=2, dtype=torch.float32, base_dtype=base_dtype),
        ]
        return layers, *ruled(layers, adamw, interval=2, warmup=3)

    layers, optimizer, _ = fresh()
    train(layers, optimizer, range(8))
    saved = copy.deepcopy(([each.state_dict() for each in layers], optimizer.state_dict()))
    losses = train(layers, optimizer, range(8, 16))
    others, resumed, rule = fresh()
    for layer, state in zip(others, saved[0], strict=True):
        layer.load_state_dict(state)
    resumed.load_state_dict(saved[1])
    assert rule.steps == 8
    assert train(others, resumed, range(8, 16)) == losses
    for layer, other in zip(layers, others, strict=True):
        assert torch.equal(layer.W, other.W)
        assert torch.equal(layer.A, other.A)


def test_a_gradient_that_is_not_finite_changes_nothing(caplog: pytest.LogCaptureFixture):
    layer = Layer(24, 16, zero=False)
    optimizer, rule = ruled([layer], adamw)
    train([layer], optimizer, range(3))
    before = copy.deepcopy((layer.state_dict(), optimizer.state_dict()["state"]))
    regress([layer], 3).backward()
    assert layer.B.grad is not None
    layer.B.grad[0, 0] = math.nan
    optimizer.step()
    torch.testing.assert_close((layer.state_dict(), optimizer.state_dict()["state"]), before)
    assert rule.steps == 3
    assert "void" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be 1 or more"),
        ({"warmup": -1}, "warmup 0 or more"),
        ({"lipschitz": 0.0}, "lipschitz must be a positive number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ScaLoRA([Layer(4, 4).factors("layer")], **options)


def test_an_optimizer_whose_state_cannot_follow_is_refused_before_the_first_step():
    layer = Layer(24, 16)
    with pytest.raises(ModelStateError, match="Adafactor cannot follow"):
        ruled([layer], torch.optim.Adafactor)


def test_an_adapter_without_a_way_to_fold_is_refused():
    layer = Layer(4, 4)
    with pytest.raises(ModelStateError, match="was given no way to"):
        ScaLoRA([Factors("layer", layer.A, layer.B, 1.0)])
