"""`adapters.prepare`: which adapters get which rule around which optimizer's steps."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import LowRank, Path, Rule, Type, adapters
from surgery.errors import ModelStateError, RuleError
from surgery.optim import Factors, StepRule
from surgery.optim.reflora import RefLoRA, precondition
from surgery.registry import ADAPTERS, STEP_RULES

WITH_RULES = ["altlora", "lora-pro", "nora-plus", "reflora", "reflora-s", "scalora"]
LINEAR = Type("Linear")


class Experts(nn.Module):
    """Two experts in one 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight).sum(1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), Experts())


def low_rank(**options: Any) -> LowRank:
    return LowRank(**{"method": "reflora", "rank": 3, "options": {"warmup": 0}, **options})


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    loss = (model(x) - x.flip(-1) @ torch.ones(6, 8)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("method", WITH_RULES)
def test_every_method_with_a_rule_trains(method):
    model = surgery.apply(network(), Rule(LowRank(method=method, rank=3)))
    optimizer = optimizer_of(model)
    prepared = adapters.prepare(model, optimizer)
    (rule,) = prepared.rules
    assert type(rule) is STEP_RULES.get(method)
    assert [each.A.shape for each in rule.factors] == [(3, 6), (3, 8), (2, 3, 6)]
    losses = [step(model, optimizer) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
    assert rule.steps == 20


@pytest.mark.parametrize("method", WITH_RULES)
def test_a_rules_options_are_the_methods(method):
    """What a rule can be told but its adapters is an option in a rule file, with one default."""
    rule = inspect.signature(STEP_RULES.get(method)).parameters
    options = ADAPTERS.get(method).Options()
    told = set(rule) - {"factors"}
    if method == "nora-plus":
        told -= {"eps"}  # a constant in the authors' code
    assert {name: getattr(options, name) for name in told} == {
        name: rule[name].default for name in told
    }


def test_gradients_are_replaced_as_the_rule_says():
    model = surgery.apply(network(), Rule(low_rank(alpha=6), where=LINEAR))
    with torch.no_grad():
        for parameter in adapters.parameters(model):
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    optimizer = torch.optim.SGD(adapters.parameters(model), lr=0.0)
    adapters.prepare(model, optimizer)
    pair = model[0].lowrank.default
    model(torch.randn(4, 6)).square().mean().backward()
    expected = precondition(pair.lora_A, pair.lora_B, pair.lora_A.grad, pair.lora_B.grad)
    optimizer.step()
    torch.testing.assert_close(pair.lora_A.grad, expected[0])
    torch.testing.assert_close(pair.lora_B.grad, expected[1])


def test_adapters_are_grouped_by_name_method_and_options():
    model = network()
    surgery.apply(model, Rule(low_rank(), where=Path("0")))
    surgery.apply(model, Rule(low_rank(options={"warmup": 5}), where=Path("2")))
    surgery.apply(model, Rule(low_rank(adapter="second"), where=LINEAR))
    surgery.apply(model, Rule(LowRank(adapter="plain", rank=2), where=LINEAR))
    rules = adapters.prepare(model, optimizer_of(model)).rules
    assert [(type(rule).__name__, rule.warmup, len(rule.factors)) for rule in rules] == [
        ("RefLoRA", 0, 1),
        ("RefLoRA", 0, 2),
        ("RefLoRA", 5, 1),
    ]
    names = [each.name for rule in rules for each in rule.factors]
    assert names == ["0.weight.default", "0.weight.second", "2.weight.second", "2.weight.default"]


def test_methods_without_a_rule_need_nothing():
    model = surgery.apply(network(), Rule(LowRank(rank=3), where=LINEAR))
    prepared = adapters.prepare(model, optimizer_of(model))
    assert prepared.rules == ()
    prepared.detach()


def test_each_slice_of_a_fused_weight_is_an_adapter_of_its_own():
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    model = GPT2Model(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    surgery.apply(model, Rule(low_rank(slices=("q", "v")), where=Path("h.0.attn.c_attn")))
    optimizer = optimizer_of(model)
    (rule,) = adapters.prepare(model, optimizer).rules
    weight = "h.0.attn.c_attn.weight.default"
    assert [each.name for each in rule.factors] == [f"{weight}.q", f"{weight}.v"]
    assert [tuple(each.B.shape) for each in rule.factors] == [(16, 3), (16, 3)]
    model(torch.arange(6)[None]).last_hidden_state.square().mean().backward()
    optimizer.step()
    assert rule.steps == 1


def test_a_tied_weight_has_one_adapter():
    model = network()
    model[2].weight = nn.Parameter(torch.randn(6, 8))
    model.append(nn.Linear(8, 6))
    model[4].weight = model[2].weight
    surgery.apply(model, Rule(low_rank(), where=Path("{2,4}")))
    (rule,) = adapters.prepare(model, optimizer_of(model)).rules
    assert len(rule.factors) == 1


def test_adapters_that_the_optimizer_does_not_hold_are_passed_over():
    model = surgery.apply(network(), Rule(low_rank(), where=LINEAR))
    trained = list(model[0].lowrank.parameters())
    (rule,) = adapters.prepare(model, torch.optim.AdamW(trained)).rules
    assert [each.name for each in rule.factors] == ["0.weight.default"]
    with pytest.raises(ModelStateError, match="none of the tensors of the 2 adapters"):
        adapters.prepare(model, torch.optim.AdamW(model[2].parameters(recurse=False)))
    with pytest.raises(ModelStateError, match="does not hold the factors of 2"):
        adapters.prepare(model, torch.optim.AdamW([model[2].lowrank.default.lora_A]))


def test_wrappers_of_model_and_optimizer_are_looked_into():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = surgery.apply(network(), Rule(low_rank(), where=LINEAR))
    wrapped, optimizer = accelerator.prepare(model, optimizer_of(model))
    (rule,) = adapters.prepare(nn.Sequential(wrapped), optimizer).rules
    step(wrapped, optimizer)
    assert rule.steps == 1


def test_what_is_no_torch_optimizer_is_refused():
    model = surgery.apply(network(), Rule(low_rank(), where=LINEAR))
    with pytest.raises(ModelStateError, match=r"builtins\.object is no torch\.optim\.Optimizer"):
        adapters.prepare(model, object())


def test_preparing_twice_is_refused_and_detaching_makes_room():
    model = surgery.apply(network(), Rule(low_rank(), where=LINEAR))
    optimizer = optimizer_of(model)
    prepared = adapters.prepare(model, optimizer)
    with pytest.raises(ModelStateError, match="already has RefLoRA"):
        adapters.prepare(model, optimizer)
    prepared.detach()
    adapters.prepare(model, optimizer)


def test_if_one_rule_cannot_be_attached_none_is():
    model = network()
    surgery.apply(model, Rule(low_rank(), where=Path("0")))
    surgery.apply(model, Rule(low_rank(method="reflora-s"), where=Path("2")))
    optimizer = torch.optim.Adafactor(adapters.parameters(model))
    with pytest.raises(ModelStateError, match="Adafactor"):
        adapters.prepare(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_merged_adapters_and_models_without_an_edit_log_are_refused():
    model = surgery.apply(network(), Rule(low_rank(), where=LINEAR))
    optimizer = optimizer_of(model)
    adapters.merge(model)
    with pytest.raises(ModelStateError, match="merged"):
        adapters.prepare(model, optimizer)
    with pytest.raises(ModelStateError, match="no edit log"):
        adapters.prepare(network(), optimizer)


def test_options_that_cannot_be_are_refused_where_they_are_written():
    for method, options, what in (
        ("reflora", {"warmup": -1}, "warmup must be 0 or more"),
        ("reflora", {"interval": "2"}, "interval"),
        ("altlora", {"beta": 1.0}, "beta from 0"),
        ("lora-pro", {"delta": 0.0}, "delta must be positive"),
        ("reflora-s", {"re_init": True}, "re_init"),
    ):
        with pytest.raises((RuleError, ValueError), match=what):
            LowRank(method=method, options=options)


def test_a_re_initialised_adapter_starts_as_no_change_with_b_that_is_not_zero():
    model = network()
    x = torch.randn(4, 6)
    before = model(x)
    rule = low_rank(options={"warmup": 0, "re_init": True})
    surgery.apply(model, Rule(rule, where=LINEAR))
    pair = model[0].lowrank.default
    assert pair.lora_B.abs().max() > 0.5 / 3**0.5
    assert pair.lora_B.abs().max() <= 1 / 3**0.5
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_rule_of_another_package_gets_the_options_that_it_takes():
    """A third party's method is in a registry, and its rule is found by name."""

    class Counting(StepRule):
        def __init__(self, factors: list[Factors], *, interval: int = 1) -> None:
            super().__init__(factors)
            self.interval = interval

        def before(self, optimizer: torch.optim.Optimizer) -> None:
            pass

    model = surgery.apply(network(), Rule(low_rank(options={"interval": 7}), where=LINEAR))
    known = STEP_RULES._loaded.get("reflora", RefLoRA)
    STEP_RULES._loaded["reflora"] = Counting
    try:
        (rule,) = adapters.prepare(model, optimizer_of(model)).rules
    finally:
        STEP_RULES._loaded["reflora"] = known
    assert isinstance(rule, Counting)
    assert rule.interval == 7
