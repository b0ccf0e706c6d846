"""Mirror maps with adapters, with shortcuts, and in exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import CreatedBy, Freeze, LowRank, Mirror, Rule, Shortcuts, Type, adapters, mirrors
from surgery import Path as At
from surgery.errors import Conflict, ExportError, ModelStateError, RuleError
from tests.passes.mirrored import Blocks, net, randomise, vectors

LORA = Rule(LowRank(rank=2), where=Type("Linear"), id="lora")


def factors(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "mirror." not in name:
                parameter.normal_(0, 0.3)


def effective(model: nn.Module, x: Tensor) -> Tensor:
    """What blocks of two linear layers compute with mapped weights and mapped factors."""
    values = mirrors.primal(model, dict(model.named_parameters()))
    for index in range(3):
        branch = x
        for layer in ("up", "down"):
            path = f"blocks.{index}.{layer}"
            weight = values[f"{path}.weight"]
            if f"{path}.lowrank.default.lora_A" in values:
                A, B = (values[f"{path}.lowrank.default.lora_{f}"] for f in "AB")
                weight = weight + B @ A
            branch = branch @ weight.T + values[f"{path}.bias"]
            branch = torch.tanh(branch) if layer == "up" else branch
        x = x + branch
    return nn.functional.layer_norm(x, (8,), values["norm.weight"], values["norm.bias"])


@pytest.mark.parametrize("map", ["diagonal", "block_iaf"])
@pytest.mark.parametrize("order", ["factors", "weights then adapters", "adapters then weights"])
def test_with_adapters(map: str, order: str) -> None:  # noqa: A002
    model, x = net(Blocks).double(), vectors().double()
    plain = model(x)
    mirror = Mirror(map=map)
    where = {"factors": CreatedBy("lora")}.get(order, Type("Linear"))
    rules = [LORA, Rule(mirror, where=where)]
    surgery.apply(model, rules[::-1] if order == "weights then adapters" else rules)
    assert torch.equal(model(x), plain)
    surgery.verify(model, x).check()
    factors(model)
    randomise(model)
    torch.testing.assert_close(model(x), effective(model, x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x), plain, atol=1e-3)
    kept = model(x)
    surgery.apply(model, Rule(Freeze()))
    assert torch.equal(model(x), kept)
    surgery.undo(model, last=1)
    surgery.undo(model)
    assert torch.equal(model(x), plain)


def test_factors_of_adapters_that_were_put_in_before() -> None:
    model, x = net(Blocks), vectors()
    surgery.apply(model, LORA)
    plan = surgery.plan(
        model, Rule(Mirror(map="block_iaf", parameters=("lora_A", "lora_B")), where=Type("Linear"))
    )
    names = {name for edit in plan.edits for name in edit.uses if not name.startswith("the ")}
    assert len(names) == 12
    assert all("lora" in name for name in names)
    plan.apply()
    model(x)


def test_merging_into_duals_is_refused() -> None:
    model = surgery.apply(net(Blocks), [LORA, Rule(Mirror(), where=Type("Linear"))])
    with pytest.raises(ModelStateError, match=r"the weight of blocks.0.up is a dual"):
        adapters.merge(model)
    surgery.apply(model, Rule(Freeze()))
    adapters.merge(model)
    inside = surgery.apply(net(Blocks), [LORA, Rule(Mirror(), where=CreatedBy("lora"))])
    factors(inside)
    randomise(inside)
    x = vectors()
    expected = inside(x)
    adapters.merge(inside)  # what is merged is what the factors are mapped to
    torch.testing.assert_close(inside(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "pissa", "scalora"])
def test_methods_that_compute_with_the_weight_do_not_go_with_its_map(method: str) -> None:
    touching = Rule(LowRank(method=method, rank=2), where=At("blocks.0.up"), id="other")
    mirror = Rule(Mirror(), where=At("blocks.0.up"))
    for rules in ([touching, mirror], [mirror, touching]):
        with pytest.raises(Conflict, match=r"dual"):
            surgery.plan(net(Blocks), rules)
    with pytest.raises(Conflict, match="itself, which as a dual"):
        surgery.plan(surgery.apply(net(Blocks), touching), mirror)
    with pytest.raises(RuleError, match="the dual of a mirror map"):
        surgery.plan(surgery.apply(net(Blocks), mirror), touching)


@pytest.mark.parametrize("map", ["diagonal", "block_iaf"])
@pytest.mark.parametrize("first", ["mirror", "shortcuts"])
def test_with_shortcuts(map: str, first: str) -> None:  # noqa: A002
    model, x = net(Blocks).double(), vectors().double()
    plain = model(x)
    rules = [Rule(Mirror(map=map)), Rule(Shortcuts(init="identity"))]
    for rule in rules if first == "mirror" else rules[::-1]:
        surgery.apply(model, rule, example=x)
    assert torch.equal(model(x), plain)
    randomise(model)
    torch.testing.assert_close(model(x), effective(model, x), rtol=1e-12, atol=1e-12)
    surgery.undo(model, last=1)
    surgery.undo(model)
    assert torch.equal(model(x), plain)


def test_coefficients_of_shortcuts_can_be_mapped() -> None:
    model, x = net(Blocks), vectors()
    rules = [
        Rule(Shortcuts(init="identity"), id="rewire"),
        Rule(Mirror(map="diagonal"), where=CreatedBy("rewire")),
    ]
    plain = model(x)
    surgery.apply(model, rules, example=x)
    assert torch.equal(model(x), plain)
    (each,) = mirrors.attached(model)
    assert "shortcuts" in each.parameters[0]


def test_methods_that_act_around_a_step_do_not_go_with_a_map_of_their_factors() -> None:
    reflora = Rule(LowRank(method="reflora", rank=2), where=At("blocks.0.up"), id="lora")
    model = surgery.apply(net(Blocks), [reflora, Rule(Mirror(), where=CreatedBy("lora"))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelStateError, match=r"'default' of blocks.0.up is mapped"):
        adapters.prepare(model, optimizer)


def test_mapped_factors_are_not_converted() -> None:
    pissa = Rule(LowRank(method="pissa", rank=2), where=At("blocks.0.up"), id="lora")
    model = surgery.apply(net(Blocks), [pissa, Rule(Mirror(), where=CreatedBy("lora"))])
    with pytest.raises(ModelStateError, match="are duals of a mirror map"):
        adapters.to_lora(model)


# Exports.


@pytest.mark.parametrize("format", ["python", "peft"])
def test_exports_are_of_frozen_maps(format: str, tmp_path: Path) -> None:  # noqa: A002
    rules = [LORA, Rule(Mirror(), where=CreatedBy("lora"))]
    model = surgery.apply(net(Blocks), rules)
    with pytest.raises(ExportError, match="mirror"):
        surgery.export(model, tmp_path / "out", format=format, example=vectors())


def test_a_compiled_program_computes_the_map(tmp_path: Path) -> None:
    model = surgery.apply(net(Blocks), Rule(Mirror(map="legendre"), where=Type("LayerNorm")))
    randomise(model)
    x = vectors()
    surgery.export(model, tmp_path / "out", format="torch_export", example=x)
    program = torch.export.load(next((tmp_path / "out").glob("*.pt2")))
    (found,) = program.module()(x).values()
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)
