"""Step rules around torch's own optimizers: order, void steps, what travels in the state dict."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from surgery.errors import CheckpointError, ModelStateError
from surgery.optim import Factors, StepRule

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1}),
    "adamw fused": (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.1}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.1}),
}


class Doubling(StepRule):
    """Doubles gradients, and keeps what it saw."""

    def __init__(self, factors: list[Factors]) -> None:
        super().__init__(factors)
        self.kept = {each.name: {"seen": torch.zeros_like(each.A)} for each in factors}
        self.calls: list[str] = []

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("before")
        for each in self.with_gradients():
            self.kept[each.name]["seen"] = each.A.grad.clone()
            each.A.grad.mul_(2)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("after")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.A = nn.Parameter(torch.randn(2, 3))
        self.B = nn.Parameter(torch.randn(4, 2))
        self.bias = nn.Parameter(torch.randn(4))

    @property
    def factors(self) -> list[Factors]:
        return [Factors("layer", self.A, self.B, 1.0)]

    def loss(self, step: int = 0) -> Tensor:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        product = x.to(self.A.dtype) @ (self.B @ self.A).T
        return (product + self.bias).square().mean()


def prepared(name: str = "adamw") -> tuple[Model, torch.optim.Optimizer, Doubling]:
    model = Model()
    kind, options = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), **options)
    rule = Doubling(model.factors)
    rule.attach(optimizer)
    return model, optimizer, rule


def step(model: Model, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    optimizer.zero_grad()
    model.loss(number).backward()
    optimizer.step()


def held(model: Model, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All numbers of a model and an optimizer with its rules."""
    state = optimizer.state_dict()["state"]
    values = [value for own in state.values() for value in own.values()]
    return copy.deepcopy([*(each.detach() for each in model.parameters()), *values])


def same(left: list[Any], right: list[Any]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("where", "value"), [("A", float("nan")), ("B", float("inf")), ("bias", -float("inf"))]
)
def test_a_gradient_that_is_not_finite_makes_a_step_void(name, where, value, caplog):
    model, optimizer, rule = prepared(name)
    step(model, optimizer)
    before = held(model, optimizer)
    optimizer.zero_grad()
    model.loss(1).backward()
    bad = getattr(model, where).grad
    bad.view(-1)[-1] = value
    with caplog.at_level(logging.WARNING, "surgery"):
        optimizer.step()
    assert same(held(model, optimizer), before)
    assert rule.steps == 1
    assert rule.calls == ["before", "after"]
    assert getattr(model, where).grad is bad
    (record,) = caplog.records
    expected = "parameter 2 of the optimizer" if where == "bias" else f"{where} of layer"
    assert expected in record.getMessage()
    step(model, optimizer, 2)
    assert rule.steps == 2
    assert not same(held(model, optimizer), before)


def test_rules_see_gradients_that_are_accumulated_unscaled_and_clipped():
    model, optimizer, rule = prepared("sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = torch.autograd.grad(model.loss(0) + model.loss(1), list(model.parameters()))
    for number in (0, 1):
        scaler.scale(model.loss(number)).backward()
    scaler.unscale_(optimizer)
    limit = 0.1
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    start = model.A.detach().clone()
    scaler.step(optimizer)
    torch.testing.assert_close(norm, nn.utils.get_total_norm(expected))
    clipped = expected[0] * (limit / norm)
    # clip_grad_norm_ divides by the norm plus 1e-6.
    torch.testing.assert_close(rule.kept["layer"]["seen"], clipped, rtol=1e-4, atol=0)
    torch.testing.assert_close(model.A, start - 0.1 * 2 * clipped, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw fused"])
def test_a_scaler_that_leaves_unscaling_to_the_optimizer_changes_nothing(name):
    plain, plain_optimizer, plain_rule = prepared("adamw")
    scaled, optimizer, rule = prepared(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(3):
        step(plain, plain_optimizer, number)
        optimizer.zero_grad()
        scaler.scale(scaled.loss(number)).backward()
        scaler.step(optimizer)
        scaler.update()
    # Powers of two: unscaling is exact, and only the kernels differ.
    torch.testing.assert_close(rule.kept["layer"]["seen"], plain_rule.kept["layer"]["seen"])
    torch.testing.assert_close(scaled.A, plain.A)
    torch.testing.assert_close(scaled.bias, plain.bias)


@pytest.mark.parametrize("name", ["adamw", "adamw fused"])
def test_a_scaler_that_finds_an_overflow_lowers_its_scale_and_nothing_else_changes(name):
    model, optimizer, rule = prepared(name)
    step(model, optimizer)
    before = held(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale(model.loss(1)).backward()
    model.B.grad.data[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert same(held(model, optimizer), before)
    assert rule.steps == 1


def test_a_closure_is_evaluated_before_the_rule():
    closed, optimizer, rule = prepared("adamw")
    other, other_optimizer, _ = prepared("adamw")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = closed.loss(3)
        loss.backward()
        return loss

    expected = closed.loss(3).item()
    assert optimizer.step(closure).item() == expected
    step(other, other_optimizer, 3)
    assert torch.equal(closed.A, other.A)
    assert rule.steps == 1


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor"])
def test_a_run_resumes_exactly_from_the_optimizers_state_dict(name):
    model, optimizer, rule = prepared(name)
    for number in range(3):
        step(model, optimizer, number)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    step(model, optimizer, 3)

    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed, resumed_optimizer, resumed_rule = prepared(name)
    resumed.load_state_dict(loaded["model"])
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    assert resumed_rule.steps == 3
    step(resumed, resumed_optimizer, 3)
    assert same(held(resumed, resumed_optimizer), held(model, optimizer))
    assert resumed_rule.steps == rule.steps == 4
    # The optimizer itself holds nothing of the rule's.
    assert not any(key.startswith("surgery_") for key in resumed_optimizer.state[resumed.A])


def test_what_is_kept_keeps_its_dtype_beside_a_narrower_parameter():
    model, optimizer, rule = prepared("adamw")
    model.bfloat16()
    rule.kept["layer"]["seen"] = torch.randn(2, 3, dtype=torch.float64)
    step(model, optimizer)
    rule.kept["layer"]["seen"] = torch.randn(2, 3, dtype=torch.float64)
    expected = rule.kept["layer"]["seen"].clone()
    saved = copy.deepcopy(optimizer.state_dict())
    rule.kept["layer"]["seen"].zero_()
    optimizer.load_state_dict(saved)
    assert torch.equal(rule.kept["layer"]["seen"], expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_travels_through_torchs_distributed_state_dicts(name):
    model, optimizer, rule = prepared(name)
    for number in range(3):
        step(model, optimizer, number)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    step(model, optimizer, 3)

    resumed, resumed_optimizer, resumed_rule = prepared(name)
    for number in range(3):
        step(resumed, resumed_optimizer, number)
    fresh_optimizer = type(optimizer)(resumed.parameters(), **OPTIMIZERS[name][1])
    fresh = Doubling(resumed.factors)
    fresh.attach(fresh_optimizer)
    resumed.zero_grad()
    # It makes a step with zero gradients, so that there is a state to load into.
    template = get_optimizer_state_dict(resumed, fresh_optimizer)
    assert template["state"]["A"].keys() == saved["state"]["A"].keys()
    assert fresh.steps == 0
    set_optimizer_state_dict(resumed, fresh_optimizer, saved)
    assert fresh.steps == 3
    step(resumed, fresh_optimizer, 3)
    assert same(held(resumed, fresh_optimizer), held(model, optimizer))
    assert resumed_rule.steps == 3
    assert rule.steps == 4


def test_a_state_of_a_run_without_the_rule_is_refused():
    model = Model()
    plain = torch.optim.AdamW(model.parameters())
    step(model, plain)
    _, optimizer, rule = prepared("adamw")
    with pytest.raises(CheckpointError, match="saved without Doubling"):
        optimizer.load_state_dict(plain.state_dict())
    assert rule.steps == 0


def test_a_rule_that_is_detached_leaves_a_plain_optimizer():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Doubling(model.factors)
    attached = rule.attach(optimizer)
    step(model, optimizer)
    attached.detach()
    attached.detach()
    start = model.A.detach().clone()
    step(model, optimizer)
    assert torch.equal(model.A, start - 0.1 * model.A.grad)
    assert rule.steps == 1
    rule.attach(optimizer)


def test_rules_of_several_adapters_act_in_one_step_and_are_void_together(caplog):
    first, second = Model(), Model()
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    rules = [Doubling(first.factors), Doubling([Factors("other", second.A, second.B, 1.0)])]
    for rule in rules:
        rule.attach(optimizer)
    (first.loss() + second.loss()).backward()
    optimizer.step()
    second.A.grad.data[0, 0] = float("nan")
    optimizer.step()
    assert [rule.steps for rule in rules] == [1, 1]
    assert len(caplog.records) == 1
    assert first.A.grad is not None
    state = optimizer.state_dict()["state"]
    assert [index for index, own in state.items() if "surgery_steps" in own] == [0, 3]


def test_a_step_in_which_all_gradients_are_zero_is_none_of_a_rule():
    model, optimizer, rule = prepared("sgd")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert rule.calls == []
    assert rule.steps == 0


def test_an_adapter_without_gradients_has_no_part_in_a_step():
    model, optimizer, rule = prepared("sgd")
    model.bias.square().sum().backward()
    optimizer.step()
    assert rule.with_gradients() == []
    assert rule.calls == ["before", "after"]


def test_attaching_what_cannot_work_is_refused():
    model = Model()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ModelStateError, match="LBFGS evaluates"):
        Doubling(model.factors).attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ModelStateError, match="no adapters"):
        Doubling([]).attach(adamw)
    with pytest.raises(ModelStateError, match="does not hold the factors of layer"):
        Doubling(model.factors).attach(torch.optim.AdamW([model.A, model.bias]))
    Doubling(model.factors).attach(adamw)
    with pytest.raises(ModelStateError, match="already has Doubling"):
        Doubling(model.factors).attach(adamw)


def test_parameters_that_were_replaced_after_attaching_are_noticed():
    model, optimizer, _ = prepared("sgd")
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2, 3))
    model.loss().backward()
    with pytest.raises(ModelStateError, match="does not hold the factors of layer"):
        optimizer.step()
