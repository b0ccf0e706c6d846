"""``verify`` on the adapters of ``lowrank``, in the states a person can put them in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import LowRank, Path, Rule, adapters
from surgery.verification import Report
from tests import zoo


def results(report: Report, prefix: str) -> set[str]:
    return {row.result for row in report.rows if row.check.startswith(prefix)}


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "t5", "qwen3_moe", "whisper", "timm_convnext", "SD3Transformer2DModel"],
)
def test_exact_at_init(name: str) -> None:
    model, example = zoo.build(name)
    surgery.apply(model, Rule(LowRank(rank=2)))
    report = surgery.verify(model, example)
    assert report.ok, str(report)
    assert results(report, "outputs") == {"equal"}
    assert results(report, "gradients") == {"equal"}
    assert results(report, "frozen by the rewrite") == {"info"}
    assert results(report, "random insertions change") == {"ok"}


def test_an_inserted_dropout_does_not_shift_those_of_the_model() -> None:
    model, example = zoo.build("bert")
    assert model.config.hidden_dropout_prob > 0
    rule = Rule(LowRank(rank=2, dropout=0.3), where=Path("encoder.**"))
    surgery.apply(model, rule)
    report = surgery.verify(model, example)
    assert report.ok, str(report)
    assert results(report, "outputs (train") == {"equal"}


def test_after_training_it_is_drift() -> None:
    model, example = zoo.build("llama")
    surgery.apply(model, Rule(LowRank(rank=2)))
    with torch.no_grad():
        next(adapters.parameters(model)).add_(1.0)
    report = surgery.verify(model, example)
    assert report.ok
    assert report.drifted
    assert "unchecked" not in str(report)


@pytest.mark.parametrize("switch", ["merge", "off"])
def test_switched_off_is_told_from_never_connected(switch: str) -> None:
    model, example = zoo.build("llama")
    surgery.apply(model, Rule(LowRank(rank=2)))
    if switch == "merge":
        adapters.merge(model)
    else:
        adapters.activate(model, {})
    report = surgery.verify(model, example)
    assert report.ok, str(report)
    assert any("switched off or merged" in each.reason for each in report.unchecked)


def test_a_merge_of_trained_adapters_is_drift_and_undone_on_the_copy_only() -> None:
    model, example = zoo.build("llama")
    surgery.apply(model, Rule(LowRank(rank=2)))
    with torch.no_grad():
        for parameter in adapters.parameters(model):
            parameter.add_(0.05)
    adapters.merge(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = surgery.verify(model, example)
    assert report.drifted
    assert results(report, "outputs") == {"drift"}
    assert adapters.merged(model) == {"default": 1.0}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_merge_without_a_copy_needs_a_baseline() -> None:
    model, example = zoo.build("llama")
    original, _ = zoo.build("llama")
    surgery.apply(model, Rule(LowRank(rank=2)))
    adapters.merge(model, keep_base="none")
    report = surgery.verify(model, example)
    reasons = {each.check: each.reason for each in report.unchecked}
    assert "pass baseline=" in reasons["outputs and gradients"]
    assert results(surgery.verify(model, example, baseline=original), "outputs") == {"equal"}


def test_an_expert_that_no_token_reaches_is_unchecked() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[0](x) + self.experts[2](x)

    model = zoo.perturb(Experts()).eval()
    surgery.apply(model, Rule(LowRank(rank=2)))
    report = surgery.verify(model, torch.randn(3, 4))
    assert report.ok, str(report)
    assert [r.detail for r in report.rows if "reached by" in r.check] == ["4 of 6"]
    (reason,) = [each.reason for each in report.unchecked]
    assert reason.startswith("experts.1.lowrank.default.lora_A and 1 more: no gradient reaches")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, example = zoo.build("llama")
    surgery.apply(model.to(dtype), Rule(LowRank(rank=2)))
    report = surgery.verify(model, example)
    assert report.ok, str(report)
    assert results(report, "outputs") == {"equal"}


def test_the_example_is_inferred() -> None:
    model, _ = zoo.build("timm_vit")
    surgery.apply(model, Rule(LowRank(rank=2)))
    report = surgery.verify(model)
    assert report.ok
    assert results(report, "outputs") == {"equal"}


@pytest.mark.filterwarnings("ignore::UserWarning:torchao")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao")
def test_a_quantised_base() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model: Any = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    quantize_(model, Int8WeightOnlyConfig())
    surgery.apply(model, Rule(LowRank(rank=2)))
    report = surgery.verify(model, torch.randn(3, 32))
    assert report.ok, str(report)
    assert results(report, "outputs (eval") == {"equal"}
    assert ("finite weights", "quantised weights are not looked into") in [
        (each.check, each.reason.partition(":")[0]) for each in report.unchecked
    ]


def test_a_gate_at_zero_hides_an_insertion_as_it_hides_the_weight() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.gate = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.gate * self.fc(x)

    model = Gated().eval()
    surgery.apply(model, Rule(LowRank(rank=2), where=Path("fc")))
    report = surgery.verify(model, torch.randn(3, 4))
    assert report.ok, str(report)
    reasons = {each.check: each.reason for each in report.unchecked}
    assert (
        "its site in the original model either" in reasons["inserted tensors reached by gradient"]
    )
    assert "nothing inserted" in reasons["random insertions change the output"]
