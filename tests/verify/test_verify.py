"""``verify`` on rewrites that keep their promise, and on the model it must leave alone."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import ContractBroken, ModelStateError
from surgery.record import record_of
from surgery.rules import Path, Rule
from surgery.verification import Report, Row
from tests import zoo
from tests.verify.rewrites import Graft, Round, Vandal

MODELS = ["bert", "gpt2", "t5", "mixtral", "timm_efficientnet", "timm_swin", "AutoencoderKL"]


class Net(nn.Module):
    """A stack with everything that verify must not disturb: dropout, statistics, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.second.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        if self.training:
            self.seen += 1
        hidden = self.drop(self.norm(self.first(x)).relu())
        return {"hidden": hidden, "out": (self.tied(self.second(hidden)), 3)}


def net() -> nn.Module:
    return zoo.perturb(Net()).eval()


def x(batch: int = 4) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(5))


def row(report: Report, check: str) -> Row:
    found = [row for row in report.rows if row.check.startswith(check)]
    assert found, [row.check for row in report.rows]
    return found[0]


@pytest.mark.parametrize("name", MODELS)
def test_an_exact_rewrite_is_equal_everywhere(name: str) -> None:
    model, example = zoo.build(name)
    surgery.apply(model, Rule(Graft()))
    report = surgery.verify(model, example)
    assert report.ok, str(report)
    assert str(report.contract) == "exact"
    compared = [r for r in report.rows if r.check.startswith(("outputs", "gradients", "buffers"))]
    assert {r.result for r in compared} == {"equal"}
    shapes = {r.check for r in compared if r.check.startswith("outputs")}
    assert len(shapes) in (4, 6)  # two modes; the given shape, another batch, another length
    assert sum(r.check.startswith("gradients") for r in compared) == 2
    assert row(report, "inserted tensors reached").result == "ok"
    assert report.unchecked == ()


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "grads": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "needs": {name: p.requires_grad for name, p in model.named_parameters()},
        "ids": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "pointers": {name: p.data_ptr() for name, p in model.named_parameters()},
        "versions": {name: p._version for name, p in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "keys": list(model.state_dict()),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "rng": torch.get_rng_state(),
        "python rng": random.getstate(),
    }


def numpy_state() -> list[int]:
    return np.random.get_state()[1].tolist()  # noqa: NPY002 - the global generator is the point


def assert_same(one: Any, other: Any, path: str = "model") -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    else:
        assert one == other, path


@pytest.mark.parametrize("rule", [Graft(), Round(), Graft(mixin="Louder", adds=None)])
def test_the_model_is_left_alone(rule: Any) -> None:
    model = net()
    model.drop.train()  # an odd mixture of modes must survive
    model.first.bias.requires_grad_(False)
    surgery.apply(model, Rule(rule))
    model(x())["hidden"].sum().backward()
    before, numpy_before = snapshot(model), numpy_state()
    log = json.dumps(record_of(model).to_dict())
    surgery.verify(model, x())
    assert_same(before, snapshot(model))
    assert numpy_before == numpy_state()
    assert json.dumps(record_of(model).to_dict()) == log


def test_a_model_in_train_mode_stays_in_it() -> None:
    model = net().train()
    surgery.apply(model, Rule(Graft()))
    before = snapshot(model)
    assert surgery.verify(model, x()).ok
    assert_same(before, snapshot(model))


def test_a_given_baseline_is_compared_and_left_alone() -> None:
    model = net()
    original = copy.deepcopy(model)
    surgery.apply(model, Rule(Graft()))
    before = snapshot(original)
    report = surgery.verify(model, x(), baseline=original)
    assert report.ok
    assert_same(before, snapshot(original))
    with torch.no_grad():
        original.first.weight[1, 2] += 1e-3
    report = surgery.verify(model, x(), baseline=original)
    assert row(report, "outputs").result == "broken"


def test_a_baseline_shows_what_undo_cannot() -> None:
    """A stock weight changed behind the log's back looks original to undo."""
    model = net()
    original = copy.deepcopy(model)
    surgery.apply(model, Rule(Graft()))
    with torch.no_grad():
        model.first.weight.mul_(1.01)
    assert surgery.verify(model, x()).ok
    assert not surgery.verify(model, x(), baseline=original).ok


def test_drift_after_training_is_no_contract() -> None:
    model = net()
    surgery.apply(model, Rule(Graft()))
    with torch.no_grad():
        model.second.shift[3] = 0.5
    report = surgery.verify(model, x())
    assert report.ok
    assert report.drifted
    assert report.contract is None
    assert row(report, "inserted tensors") == Row(
        "inserted tensors",
        "drift",
        where="second.shift",
        detail="1 of 3 changed since they were inserted",
    )
    assert row(report, "outputs").result == "drift"
    assert row(report, "outputs").where.startswith("out[0][")
    assert "drift" in str(report)


def test_stock_weights_may_be_trained_without_drift() -> None:
    model = net()
    surgery.apply(model, Rule(Graft()))
    with torch.no_grad():
        model.first.weight.add_(0.1)
    assert not surgery.verify(model, x()).drifted


def test_a_close_rewrite_is_within_its_bounds() -> None:
    model = net()
    surgery.apply(model, Rule(Round()))
    report = surgery.verify(model, x())
    assert report.ok
    assert report.contract.kind == "close"
    assert {r.result for r in report.rows if r.check.startswith("outputs")} <= {"equal", "within"}


def test_bounds_can_be_set_by_hand() -> None:
    model = net()
    surgery.apply(model, Rule(Graft(mixin="Louder", adds=None)))
    assert not surgery.verify(model, x(), rtol=1e-6).ok
    report = surgery.verify(model, x(), rtol=0.05, atol=0.05)
    assert report.ok, str(report)
    assert row(report, "outputs").result == "within"
    assert 0 < row(report, "outputs").worst < 0.05


def test_a_rewrite_that_is_meant_to_change_is_told_by_how_much() -> None:
    model = net()
    surgery.apply(model, Rule(Graft(mixin="Louder", adds=None, promise="changes")))
    report = surgery.verify(model, x())
    assert report.ok
    assert row(report, "outputs").result == "changed"
    assert row(report, "outputs").worst > 0


def test_gradients_can_be_left_out() -> None:
    model = net()
    surgery.apply(model, Rule(Graft()))
    report = surgery.verify(model, x(), gradients=False)
    assert report.ok
    assert not [r for r in report.rows if r.check.startswith("gradients")]
    assert "gradients" in [each.check for each in report.unchecked]


def test_a_model_on_meta_is_checked_for_structure_only() -> None:
    with torch.device("meta"):
        model = Net()
    surgery.apply(model, Rule(Graft()))
    report = surgery.verify(model, x())
    assert report.ok
    assert row(report, "state-dict keys").result == "equal"
    reasons = {each.check: each.reason for each in report.unchecked}
    assert "meta" in reasons["outputs and gradients"]
    assert "meta" in reasons["finite weights"]


class Noisy(nn.Module):
    """Draws from the operating system: no seed can make it repeat itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + random.SystemRandom().random()


def test_a_model_that_differs_from_itself_is_told() -> None:
    model = Noisy()
    surgery.apply(model, Rule(Graft()))
    report = surgery.verify(model, x())
    assert report.ok
    reasons = [each.reason for each in report.unchecked if each.check.startswith("outputs")]
    assert reasons
    assert all("not deterministic" in reason for reason in reasons)


def test_a_mode_that_the_original_cannot_run_is_unchecked() -> None:
    model = net()
    surgery.apply(model, Rule(Graft()))
    report = surgery.verify(model, x(1))  # batch norm refuses one row in train mode
    assert report.ok
    assert row(report, "outputs (eval").result == "equal"
    reasons = {each.check: each.reason for each in report.unchecked}
    assert "Expected more than 1 value" in reasons["outputs (train, given shape)"]


def test_without_an_example_the_numbers_are_unchecked() -> None:
    model = net()
    surgery.apply(model, Rule(Graft()))
    report = surgery.verify(model)
    assert report.ok
    assert "outputs and gradients" in [each.check for each in report.unchecked]


def test_a_model_that_cannot_be_copied_is_compared_with_a_baseline_only() -> None:
    model = net()
    surgery.apply(model, Rule(Graft()))
    model.lock = (i for i in range(3))  # a generator cannot be copied
    report = surgery.verify(model, x())
    assert any("cannot be copied" in each.reason for each in report.unchecked)


def test_sizes_and_flops_before_and_after() -> None:
    model = net()
    surgery.apply(model, Rule(Graft()))
    report = surgery.verify(model, x())
    assert row(report, "parameters").detail == "152 before, 176 after, 176 trainable"
    assert row(report, "memory of weights").detail.startswith("688 B before, 784 B after")
    assert row(report, "FLOPs").detail == "1.41 k before, 1.41 k after"
    assert row(report, "kept for backward").result == "info"


def test_nothing_to_verify() -> None:
    with pytest.raises(ModelStateError, match="nothing to verify"):
        surgery.verify(net(), x())


def test_a_wrapper_is_refused_with_what_to_verify() -> None:
    model = net()
    surgery.apply(model, Rule(Graft()))
    with pytest.raises(ModelStateError, match="'module' inside this DataParallel") as info:
        surgery.verify(nn.DataParallel(model), x())
    assert "surgery.verify(model.module)" in info.value.hint


def test_undo_that_writes_where_no_edit_says_so_is_not_passed_over() -> None:
    model = net()
    surgery.apply(model, Rule(Vandal(), where=Path("first")))
    with pytest.raises(ContractBroken, match=r"wrote to second\.weight, which no edit of vandal"):
        surgery.verify(model, x())


def test_the_report_as_data_and_as_an_error() -> None:
    model = net()
    surgery.apply(model, Rule(Graft(mixin="Louder", adds=None)))
    report = surgery.verify(model, x())
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False
    assert data["contract"] == "exact"
    assert {"check", "result", "worst", "where", "detail"} == set(data["rows"][0])
    with pytest.raises(ContractBroken, match=r"outputs \(eval, given shape\).*at hidden\[") as info:
        report.check()
    assert info.value.code == "SRG-CONTRACT"
    assert "broken" in str(report)


def test_an_optimizer_made_before_stays_valid() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgery.apply(model, Rule(Graft()))
    surgery.verify(model, x())
    model(x())["out"][0].sum().backward()
    held = model.first.weight.clone()
    optimizer.step()
    assert not torch.equal(held, model.first.weight)


class Cache:
    """An object like the key-value caches of transformers."""

    def __init__(self, *tensors: Tensor) -> None:
        self.layers = [*tensors]
        self.owner = self


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return y.detach() * 0, None, Cache(x, y)


def test_tensors_inside_objects_are_compared() -> None:
    model = Cached()
    surgery.apply(model, Rule(Graft(mixin="Louder", adds=None)))
    found = row(surgery.verify(model, x()), "outputs")
    assert found.result == "broken"
    assert found.where.startswith("[2].layers[1][")
