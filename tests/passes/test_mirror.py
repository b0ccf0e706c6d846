"""The pass ``mirror``: what it plans, refuses, freezes, logs, saves, bakes in and takes back."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import surgery
from architectures.mirror import BlockIAF, Diagonal, Legendre
from surgery import Freeze, Mirror, Rule, Type, mirrors
from surgery import Path as At
from surgery.errors import Conflict, ModelStateError, NoMatch, RuleError
from surgery.passes.duals import attachments
from surgery.record import Record, record_of
from tests.passes.mirrored import (
    MAPS,
    Net,
    by_hand,
    images,
    mapped,
    net,
    randomise,
    result,
    same,
    state,
)


class Tied(nn.Module):
    """An embedding whose weight the head uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map": "diagnal"}, "unknown map 'diagnal'.*did you mean 'diagonal'"),
        ({"map": "legendre", "options": {"pieces": 3}}, "map 'legendre' has no option 'pieces'"),
        ({"map": "legendre", "options": {"rank": "4"}}, "rank"),
        ({"map": "block_iaf", "options": {"blocks": "layer"}}, "blocks"),
        ({"map": "block_iaf", "options": {"shrink": 2}}, "shrink"),
        ({"parameters": ()}, "parameters"),
        ({"freeze": "model"}, "freeze"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"rank": 4}, "unknown.*'rank'"),
    ],
)
def test_bad_options_are_refused_where_they_are_given(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuleError, match=f"(?s){message}"):
        Mirror(**options)


def test_options_that_do_not_suit_a_parameter_name_it() -> None:
    rule = Rule(Mirror(map="block_iaf", options={"blocks": 0}))
    with pytest.raises(RuleError, match=r"map 'block_iaf' on scale_of_all.*and 6 more.*blocks=0"):
        surgery.plan(net(), rule)


def test_a_rule_file_says_the_same(tmp_path: Path) -> None:
    text = """
version: 1
rules:
  - id: duals
    pass: mirror
    where: {type: [LayerNorm, Linear]}
    with: {map: block_iaf, options: {blocks: module, shrink: [2, 3]}, freeze: rest}
"""
    recipe = surgery.Recipe.loads(text)
    made = Mirror(map="block_iaf", options={"blocks": "module", "shrink": [2, 3]}, freeze="rest")
    assert recipe.rules[0].options == made
    assert surgery.Recipe.loads(recipe.to_yaml()) == recipe
    assert surgery.Recipe.parse(json.loads(json.dumps(recipe.dump()))) == recipe
    assert made.made_with == BlockIAF.Options(blocks="module", shrink=(2, 3))


def test_lists_in_python_are_what_lists_in_a_file_are() -> None:
    text = "version: 1\nrules:\n  - pass: mirror\n    with: {parameters: [weight, bias]}\n"
    listed: Any = ["weight", "bias"]
    assert Mirror(parameters=listed) == Mirror(parameters=("weight", "bias"))
    assert surgery.Recipe.loads(text).rules[0].options == Mirror(parameters=listed)
    empty: Any = []
    with pytest.raises(RuleError, match=r"Mirror.parameters: must not be empty"):
        Mirror(parameters=empty)


# Planning.


def test_the_plan_counts_the_map_and_warns_past_one_times_what_it_maps() -> None:
    model = net()
    plan = surgery.plan(model, Rule(Mirror(map="block_iaf"), where=Type("LayerNorm")))
    assert plan.totals.added == 2 * 16
    assert "2 times the 16" in plan.warnings[0]
    assert str(plan).count("block_iaf of 2 parameters (blocks=4, shrink=2x2x2)") == 1
    cheap = surgery.plan(model, Rule(Mirror(map="diagonal"), where=At("conv")))
    assert cheap.totals.added == 2 * 6
    assert not cheap.warnings
    few = surgery.plan(model, Rule(Mirror(map="legendre", options={"rank": 1}), where=At("conv")))
    many = surgery.plan(model, Rule(Mirror(map="legendre", options={"rank": 9}), where=At("conv")))
    assert few.totals.added < many.totals.added
    assert not few.warnings
    assert many.warnings
    strong = {"blocks": 2, "shrink": [8, 8, 8]}
    weak = Rule(Mirror(map="block_iaf", options={**strong, "shrink": [2]}))
    shrunk = surgery.plan(model, Rule(Mirror(map="block_iaf", options=strong)))
    assert shrunk.totals.added < surgery.plan(model, weak).totals.added
    assert type(model) is Net
    assert record_of(model) is None


def test_names_of_what_is_added() -> None:
    model = net()
    alone = surgery.plan(model, Rule(Mirror(), where=At("{conv,scale_of_all}")))
    assert [name for edit in alone.edits for name in edit.adds] == [
        "mirror.scale_of_all.log_slopes",
        "mirror.scale_of_all.shift",
        "conv.mirror.weight.log_slopes",
        "conv.mirror.weight.shift",
        "conv.mirror.bias.log_slopes",
        "conv.mirror.bias.shift",
    ]
    together = surgery.plan(model, Rule(Mirror(map="layer_iaf"), where=Type("LayerNorm")))
    assert {name.rpartition(".")[0] for name in together.edits[0].adds} >= {"mirror.0.first.0"}
    assert [edit.site for edit in together.edits] == ["norm"]


def test_parameters_narrow_a_rule_down() -> None:
    model = net()
    surgery.apply(model, Rule(Mirror(parameters=("weight",))))
    names = [name for each in mirrors.attached(model) for name in each.parameters]
    assert sorted(names) == ["conv.weight", "head.weight", "norm.weight"]
    with pytest.raises(NoMatch, match="it has no parameter called gain"):
        surgery.plan(net(), Rule(Mirror(parameters=("gain",))))


def test_several_maps_of_several_parameters() -> None:
    model = net()
    surgery.apply(model, Rule(Mirror(map="block_iaf"), where=At("conv")))
    surgery.apply(model, Rule(Mirror(map="layer_iaf"), where=At("head")))
    assert [each.map for each in mirrors.attached(model)] == ["mirror.0", "mirror.1"]
    two = [
        Rule(Mirror(map="block_iaf"), where=At("conv"), id="a"),
        Rule(Mirror(map="block_iaf"), where=At("head"), id="b"),
    ]
    other = surgery.apply(net(), two)
    assert [each.map for each in mirrors.attached(other)] == ["mirror.0", "mirror.1"]
    surgery.undo(model, last=1)
    assert [each.map for each in mirrors.attached(model)] == ["mirror.0"]


# What is refused.


def test_parameters_that_share_storage_are_refused() -> None:
    ids = torch.arange(4).unsqueeze(0)
    model = net(Tied)
    with pytest.raises(Conflict, match=r"embed.weight and head.weight share their memory"):
        surgery.plan(model, Rule(Mirror()), example=ids)
    rest = Rule(Mirror(), except_=At("{embed,head}"))
    assert [edit.site for edit in surgery.plan(model, rest, example=ids).edits] == ["body"]

    view = net()
    view.norm.bias = nn.Parameter(view.scale_of_all.data[:])
    with pytest.raises(Conflict, match=r"share their memory"):
        surgery.plan(view, Rule(Mirror(), where=Type("LayerNorm")))


def test_what_cannot_be_mapped_says_why() -> None:
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NoMatch, match=r"its weight is a Parameter of torch.int8: quantised"):
        surgery.plan(quantised, Rule(Mirror()))
    lstm = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(NoMatch, match="past any map"):
        surgery.plan(lstm, Rule(Mirror()))
    computed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4, bias=False)))
    with pytest.raises(NoMatch, match="a parametrization computes"):
        surgery.plan(computed, Rule(Mirror()))
    with pytest.raises(NoMatch, match="not initialised yet"):
        surgery.plan(nn.Sequential(nn.LazyLinear(3)), Rule(Mirror()))


def test_a_name_that_is_taken() -> None:
    model = net()
    model.norm.mirror = 3
    with pytest.raises(Conflict, match="norm has an attribute 'mirror' of its own"):
        surgery.plan(model, Rule(Mirror()))
    root = net()
    root.mirror = 3
    with pytest.raises(Conflict, match="the model has an attribute 'mirror' of its own"):
        surgery.plan(root, Rule(Mirror(map="block_iaf"), where=At("conv")))
    assert surgery.plan(root, Rule(Mirror(), where=At("conv"))).edits


def test_a_parameter_is_mapped_once() -> None:
    model = mapped("legendre", where=At("conv"))
    with pytest.raises(Conflict, match=r"conv.weight has a mirror map already"):
        surgery.plan(model, Rule(Mirror(), where=At("conv")))
    twice = [Rule(Mirror(), id="a"), Rule(Mirror(map="legendre"), where=At("conv"), id="b")]
    with pytest.raises(Conflict, match=r"the mirror map of conv.weight"):
        surgery.plan(net(), twice)


def test_a_map_does_not_map_itself() -> None:
    model = mapped("legendre", where=At("conv"))
    plan = surgery.plan(model, Rule(Mirror(), except_=At("conv")))
    assert {edit.site for edit in plan.edits} == {"norm", "head", "scale_of_all"}


def test_a_map_in_a_narrower_dtype_would_round() -> None:
    with pytest.raises(RuleError, match=r"a map in float32 rounds the float64 parameters of"):
        surgery.plan(net().double(), Rule(Mirror(dtype="float32")))
    wide = surgery.plan(net(), Rule(Mirror(dtype="float64"), where=At("norm")))
    assert {spec.dtype for edit in wide.edits for spec in edit.adds.values()} == {"float64"}


# The model computes with what the map makes of its parameters.


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_starts_exactly_as_the_model_was(map: str, dtype: torch.dtype) -> None:  # noqa: A002
    model, x = net().to(dtype), images().to(dtype)
    before, kept = model(x), state(model)
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    surgery.apply(model, Rule(Mirror(map=map)))
    assert torch.equal(model(x), before)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    with torch.inference_mode():
        assert torch.equal(model(x), before)
    now = dict(model.named_parameters())
    assert objects == {name: id(now[name]) for name in objects}
    assert [key for key in model.state_dict() if "mirror." not in key] == list(kept)
    surgery.undo(model)
    assert type(model) is Net
    assert same(state(model), kept)
    assert {n for m in model.modules() for n in vars(m) if "surgery" in n} == set()


@pytest.mark.parametrize("map", MAPS)
def test_it_computes_with_the_mapped_values(map: str) -> None:  # noqa: A002
    model, x = net().double(), images().double()
    before = model(x)
    surgery.apply(model, Rule(Mirror(map=map)))
    randomise(model)
    assert not torch.allclose(model(x), before, atol=1e-3)
    # The same products of the same numbers.
    torch.testing.assert_close(model(x), by_hand(model, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("map", MAPS)
def test_verify(map: str) -> None:  # noqa: A002
    model, x = net(), images()
    surgery.apply(model, Rule(Mirror(map=map)))
    report = surgery.verify(model, x)
    report.check()
    assert str(report.contract) == "exact"
    assert result(report, "random insertions change the output") == "ok"
    randomise(model)
    assert result(surgery.verify(model, x), "inserted tensors") == "drift"


def test_gradients_reach_duals_and_map_alike() -> None:
    model, x = mapped("legendre").double(), images().double()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    # By differences, of one dual and one number of its map.
    for name in ("conv.bias", "conv.mirror.bias.offsets"):
        parameter = dict(model.named_parameters())[name]
        with torch.no_grad():
            parameter[0] += 1e-6
            up = model(x).square().sum()
            parameter[0] -= 2e-6
            down = model(x).square().sum()
            parameter[0] += 1e-6
        assert float(parameter.grad[0]) == pytest.approx(float(up - down) / 2e-6, rel=1e-5)


def test_a_map_is_computed_once_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward, one = BlockIAF.forward, BlockIAF.one

    def counted(self: BlockIAF, *dual: Tensor) -> Any:
        calls.append(len(dual))
        return forward(self, *dual)

    def counted_one(self: BlockIAF, index: int, *dual: Tensor) -> Tensor:
        calls.append(1)
        return one(self, index, *dual)

    model, x = mapped("block_iaf"), images()
    monkeypatch.setattr(BlockIAF, "forward", counted)
    monkeypatch.setattr(BlockIAF, "one", counted_one)
    model(x)
    assert calls == [7]
    calls.clear()
    _ = model.head.weight  # a part by itself computes what it needs
    assert calls == [1]


def test_a_part_computes_the_same_by_itself() -> None:
    model, x = mapped("block_iaf"), images()
    features = torch.tanh(model.conv(x)).mean((2, 3))
    assert torch.equal(model.head(model.norm(features) * model.scale_of_all), model(x))


def test_the_signature_of_forward_stays() -> None:
    import inspect

    assert inspect.signature(mapped().forward) == inspect.signature(net().forward)


def test_lists_of_layers_stay_lists_of_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    before = model(x)
    surgery.apply(model, Rule(Mirror(map="block_iaf")))
    assert torch.equal(model(x), before)
    assert len(model) == 3
    assert [type(each).__name__ for each in model] == ["Linear", "ReLU", "Linear"]
    assert model[-1] is model.get_submodule("2")
    surgery.undo(model)
    assert type(model) is nn.Sequential
    assert len(model) == 3


# Copies.


@pytest.mark.parametrize("map", MAPS)
def test_copies_are_on_their_own(map: str) -> None:  # noqa: A002
    model, x = mapped(map), images()
    expected = model(x)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    for other in copies:
        assert torch.equal(other(x), expected)
        inside = {id(module) for module in other.modules()}
        for each in attachments(other):
            assert id(each.map) in inside
            assert all(id(module) in inside for module, _ in each.members)
        with torch.no_grad(), mirrors.unmapped(model):
            other.head.bias.add_(1)
            raw = model(x)
            assert torch.allclose(other(x), expected)  # reading made no parameter
        assert not torch.allclose(raw, expected)
        dict(other.named_parameters())["head.bias"].data.add_(1)
        assert not torch.allclose(other(x), expected)
    assert torch.equal(model(x), expected)
    surgery.undo(model)
    for other in copies:
        surgery.undo(other)


# Save, restore, undo.


@pytest.mark.parametrize("map", MAPS)
def test_save_and_restore(map: str, tmp_path: Path) -> None:  # noqa: A002
    model, x = mapped(map), images()
    expected, kept = model(x), state(model)
    surgery.save(model, tmp_path / "whole")
    again = surgery.restore(tmp_path / "whole", model=net(seed=5))
    assert torch.equal(again(x), expected)
    assert same(state(again), kept)
    surgery.save(model, tmp_path / "map", adapter_only=True)
    stock = surgery.undo(copy.deepcopy(model))
    beside = surgery.restore(tmp_path / "map", model=stock)
    assert torch.equal(beside(x), expected)


def test_trained_duals_keep_their_values_when_a_map_is_undone() -> None:
    model, x = mapped("legendre"), images()
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    trained = {name: tensor for name, tensor in state(model).items() if "mirror." not in name}
    surgery.undo(model)
    assert same(state(model), trained)


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), images()
    before, kept = model(x), state(model)
    plan = surgery.plan(model, Rule(Mirror(map="legendre")))
    start, calls = Legendre.start, []

    def failing(self: Legendre, generator: torch.Generator | None) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no more")
        start(self, generator)

    monkeypatch.setattr(Legendre, "start", failing)
    with pytest.raises(RuntimeError, match="no more"):
        plan.apply()
    assert type(model) is Net
    assert torch.equal(model(x), before)
    assert same(state(model), kept)


def test_what_was_wrapped_since_is_not_undone() -> None:
    model = mapped("legendre")
    model.norm.forward = lambda x: x
    with pytest.raises(ModelStateError, match=r"norm: .*forward of its own"):
        surgery.undo(model)


def test_seeds() -> None:
    one, same_again = (surgery.apply(net(), Rule(Mirror(map="block_iaf"))) for _ in range(2))
    assert same(state(one), state(same_again))
    recipe = surgery.Recipe(rules=[Rule(Mirror(map="block_iaf"))], seed=1)
    assert not same(state(one), state(surgery.apply(net(), recipe)))


def test_what_stays_trainable() -> None:
    rule = Rule(Mirror(freeze="rest"), where=Type("LayerNorm"))
    model = surgery.apply(net(), rule)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "norm.weight",
        "norm.bias",
        *(f"norm.mirror.{name}.{own}" for name in ("weight", "bias") for own in OWN),
    }
    surgery.undo(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(p.requires_grad for p in surgery.apply(net(), Rule(Mirror())).parameters())


OWN = ("log_slopes", "shift")


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    surgery.apply(model, Rule(Mirror(map="block_iaf")))
    expected = surgery.apply(net(), Rule(Mirror(map="block_iaf")))
    assert model(images().to("meta")).shape == (2, 5)
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict(), strict=False)
    from surgery.editing import begin

    begin(model)
    assert same(state(model), state(expected))
    with torch.device("meta"):
        other = surgery.apply(Net(), Rule(Mirror()))
    with pytest.raises(RuleError, match="meta device, so it has no values to bake in"):
        surgery.plan(other, Rule(Freeze()))


# Freeze.


@pytest.mark.parametrize("map", MAPS)
def test_freeze_bakes_the_values_in_and_removes_the_map(map: str, tmp_path: Path) -> None:  # noqa: A002
    model, x = mapped(map), images()
    expected, before = model(x), state(model)
    objects = {name: id(p) for name, p in model.named_parameters() if "mirror." not in name}
    plan = surgery.plan(model, Rule(Freeze()))
    assert plan.totals.trainable == sum(p.numel() for p in net().parameters())
    plan.apply()
    assert type(model) is Net
    assert list(model.state_dict()) == list(net().state_dict())
    assert torch.equal(model(x), expected)
    assert objects == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert result(surgery.verify(model, x), "inserted tensors") == "drift"
    surgery.save(model, tmp_path / "frozen")
    for each in (model, surgery.restore(tmp_path / "frozen", model=net(seed=5))):
        surgery.undo(each, last=1)
        assert same(state(each), before)
        assert torch.equal(each(x), expected)
        surgery.apply(each, Rule(Freeze()))
        surgery.undo(each)
        assert torch.equal(each(x), net()(x))


def test_a_frozen_map_that_was_never_trained_is_exact() -> None:
    model = surgery.apply(net(), Rule(Mirror(map="block_iaf")))
    surgery.apply(model, Rule(Freeze()))
    report = surgery.verify(model, images())
    report.check()
    assert result(report, "inserted tensors") == "equal"


def test_one_map_of_several_is_frozen() -> None:
    model, x = mapped("legendre"), images()
    expected = model(x)
    surgery.apply(model, Rule(Freeze(), where=At("norm")))
    left = {name for each in mirrors.attached(model) for name in each.parameters}
    assert torch.equal(model(x), expected)
    assert "norm.weight" not in left
    assert "conv.weight" in left
    with pytest.raises(NoMatch, match="holds nothing that is mapped"):
        surgery.plan(model, Rule(Freeze(), where=At("norm")))


def test_a_map_of_several_parameters_is_frozen_as_a_whole() -> None:
    model, x = mapped("block_iaf"), images()
    expected = model(x)
    surgery.apply(model, Rule(Freeze(), where=At("norm")))
    assert not mirrors.attached(model)
    assert torch.equal(model(x), expected)


def test_a_parameter_gets_another_map_once_the_first_is_baked_in(tmp_path: Path) -> None:
    model, x = mapped("legendre", where=At("norm")), images()
    states, outputs = [state(model)], [model(x)]
    surgery.apply(model, Rule(Freeze()))
    states.append(state(model))
    surgery.apply(model, Rule(Mirror(map="diagonal"), where=At("norm"), id="second"))
    assert torch.equal(model(x), outputs[0])
    randomise(model, 0.3)
    states.append(state(model))
    outputs.append(model(x))
    assert not torch.allclose(*outputs, atol=1e-3)
    with pytest.raises(Conflict, match=r"norm.weight has a mirror map already"):
        surgery.plan(model, Rule(Mirror(), where=At("norm")))
    surgery.apply(model, Rule(Freeze()))
    surgery.save(model, tmp_path / "twice")
    for each in (model, surgery.restore(tmp_path / "twice", model=net(seed=5))):
        assert not mirrors.attached(each)
        assert torch.equal(each(x), outputs[1])
        surgery.undo(each, last=1)
        assert same(state(each), states[2])
        assert torch.equal(each(x), outputs[1])
        surgery.undo(each, last=2)
        assert same(state(each), states[0])
        assert torch.equal(each(x), outputs[0])
        surgery.undo(each)
        assert type(each) is Net


def test_frozen_for_good() -> None:
    model = mapped("legendre")
    surgery.apply(model, Rule(Freeze(keep_base="none")))
    record = record_of(model)
    assert isinstance(record, Record)
    assert not record.operations[-1].kept
    with pytest.raises(ModelStateError, match=r"changed .* for good"):
        surgery.undo(model)


# Names.


def test_primal_and_dual() -> None:
    model = mapped("block_iaf")
    values = dict(model.named_parameters())
    phi = mirrors.primal(model, values)
    assert list(phi) == list(values)
    assert all(phi[name] is values[name] for name in values if "mirror." in name)
    back = mirrors.dual(model, phi)
    for name, value in values.items():
        torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-6)
    few = mirrors.primal(model, {"norm.bias": torch.ones(8)})
    assert set(few) == {name for name in values if "mirror." not in name}
    with pytest.raises(ModelStateError, match=r"'norm.bia' is no parameter.*\n.*norm.bias"):
        mirrors.primal(model, {"norm.bia": torch.ones(8)})
    with pytest.raises(ModelStateError, match="value of one of them is missing"):
        mirrors.dual(model, {"norm.bias": torch.ones(8)})


def test_pretrained_values_have_their_duals() -> None:
    model, x = mapped("legendre"), images()
    pretrained = net(seed=9)
    model.load_state_dict(mirrors.dual(model, dict(pretrained.named_parameters())), strict=False)
    torch.testing.assert_close(model(x), pretrained(x), rtol=1e-4, atol=1e-5)


def test_the_names_of_a_map() -> None:
    model = mapped("diagonal", where=At("norm"))
    weight, bias = mirrors.attached(model)
    assert weight.parameters == ("norm.weight",)
    assert bias.map == "norm.mirror.bias"
    assert weight.map_parameters == tuple(f"norm.mirror.weight.{own}" for own in OWN)
    assert weight.kind is Diagonal
    assert mirrors.attached(net()) == []
