"""What stays trainable where ``mirror`` meets rules that freeze, and what a plan says of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import surgery
from surgery import CreatedBy, Freeze, LowRank, Mirror, Rule, Type, mirrors
from surgery import Path as At
from tests.passes.mirrored import Blocks, net, randomise, vectors

LORA = Rule(LowRank(rank=2), where=Type("Linear"), id="lora")
NORMS = Rule(Mirror(), where=Type("LayerNorm"), id="norms")
DUALS = {"norm.weight", "norm.bias"}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def stock(model: nn.Module) -> set[str]:
    return {name for name in trained(model) if "lowrank" not in name and "mirror" not in name}


def of_maps(model: nn.Module) -> set[str]:
    return {name for each in mirrors.attached(model) for name in each.map_parameters}


@pytest.mark.parametrize("rules", [[LORA, NORMS], [NORMS, LORA]], ids=["after", "before"])
def test_duals_of_one_recipe_stay_trainable(rules: Sequence[Rule]) -> None:
    model = net(Blocks)
    plan = surgery.plan(model, rules)
    assert not [text for text in plan.warnings if "require gradients" in text]
    plan.apply()
    assert stock(model) == DUALS
    assert of_maps(model) <= trained(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.totals.trainable == count
    surgery.undo(model)
    assert trained(model) == {name for name, _ in net(Blocks).named_parameters()}


def test_weights_beside_adapters_stay_trainable_if_a_rule_maps_them() -> None:
    both = At("blocks.0.up")
    for freeze in ("model", "sites"):
        lora = Rule(LowRank(rank=2, freeze=freeze), where=both, id="lora")
        model = surgery.apply(net(Blocks), [lora, Rule(Mirror(), where=both)])
        assert {"blocks.0.up.weight", "blocks.0.up.bias"} <= trained(model)
        assert ("blocks.0.down.weight" in trained(model)) == (freeze == "sites")


def test_rules_that_freeze_the_rest_spare_the_duals_of_each_other() -> None:
    rest = [
        Rule(Mirror(freeze="rest"), where=Type("LayerNorm"), id="norms"),
        Rule(Mirror(freeze="rest", map="legendre"), where=At("blocks.0.up"), id="up"),
    ]
    one = surgery.apply(net(Blocks), rest)
    assert stock(one) == {*DUALS, "blocks.0.up.weight", "blocks.0.up.bias"}
    two = surgery.apply(net(Blocks), rest[0])
    plan = surgery.plan(two, rest[1])
    assert any("2 of the 2 parameters that it maps do not require" in w for w in plan.warnings)


def test_mirror_first_and_adapters_later() -> None:
    model = surgery.apply(net(Blocks), NORMS)
    plan = surgery.plan(model, LORA)
    plan.apply()
    assert stock(model) == DUALS
    assert plan.totals.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    surgery.undo(model, last=1)
    assert stock(model) == {name for name, _ in net(Blocks).named_parameters()}


def test_adapters_first_and_mirror_later_is_told() -> None:
    model = surgery.apply(net(Blocks), LORA)
    (text,) = surgery.plan(model, NORMS).warnings
    assert "'norms': 2 of the 2 parameters that it maps do not require gradients" in text
    assert "(norm.weight, norm.bias)" in text
    assert "requires_grad_(True)" in text
    assert "both rules into one recipe" in text
    model.norm.requires_grad_(True)
    plan = surgery.plan(model, NORMS)
    assert not plan.warnings
    plan.apply()
    assert stock(model) == DUALS


def test_parameters_that_were_frozen_by_hand_are_told() -> None:
    model = net(Blocks)
    for block in model.blocks:
        block.up.requires_grad_(False)
    rule = Rule(Mirror(map="block_iaf", options={"shrink": [8, 8]}))
    texts = [text for text in surgery.plan(model, rule).warnings if "require gradients" in text]
    assert "6 of the 14 parameters" in texts[0]
    assert "blocks.1.up.weight and 3 more" in texts[0]
    surgery.apply(model, rule)
    assert "blocks.0.up.weight" not in trained(model)  # nobody asked for it


def test_factors_of_adapters_are_no_rest() -> None:
    rules = [LORA, Rule(Mirror(freeze="rest"), where=CreatedBy("lora"))]
    plan = surgery.plan(net(Blocks), rules)
    assert not plan.warnings
    model = plan.apply()
    assert stock(model) == set()
    assert {name for name, _ in model.named_parameters() if "lowrank" in name} <= trained(model)


def test_what_was_baked_in_is_a_rest_again() -> None:
    model = surgery.apply(net(Blocks), NORMS)
    surgery.apply(model, Rule(Freeze()))
    plan = surgery.plan(model, LORA)
    copied = plan.apply(copy=True)
    assert stock(copied) == set()
    assert plan.totals.trainable == sum(p.numel() for p in copied.parameters() if p.requires_grad)


def test_a_step_moves_what_is_said_to_be_trained() -> None:
    model, x = surgery.apply(net(Blocks), [LORA, NORMS]), vectors()
    randomise(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(x).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= DUALS
    assert moved <= trained(model)
