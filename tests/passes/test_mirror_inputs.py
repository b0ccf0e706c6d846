"""``mirror`` over what models can be made of: coefficients, shared, quantised, mixed, broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import CreatedBy, Freeze, LowRank, Mirror, Rule, Shortcuts, Type, mirrors
from surgery import Path as At
from surgery.errors import Conflict, ModelStateError, NoMatch, RuleError
from tests.passes.mirrored import (
    MAPS,
    Blocks,
    Net,
    images,
    net,
    randomise,
    same,
    state,
    vectors,
)

REWIRE = Rule(Shortcuts(init="identity"), id="rewire")


# Coefficients of shortcuts.


@pytest.mark.parametrize("map", ["diagonal", "block_iaf"])
@pytest.mark.parametrize("before", [False, True], ids=["a stock model", "a rewritten one"])
def test_coefficients_are_what_the_map_makes_of_them(
    map: str,  # noqa: A002
    before: bool,
    tmp_path: Path,
) -> None:
    model, x = net(Blocks), vectors()
    plain = model(x)
    if before:
        surgery.apply(model, Rule(LowRank(rank=2, freeze="none"), where=At("blocks.0.up")))
    mirror = Rule(Mirror(map=map), where=CreatedBy("rewire"), id="duals")
    surgery.apply(model, [REWIRE, mirror], example=x)
    assert torch.equal(model(x), plain)
    logits = next(p for n, p in model.named_parameters() if n.endswith("topology.logits"))
    with torch.no_grad():  # as many as are equal give equal coefficients, whatever is added to all
        logits.copy_(torch.linspace(-0.02, 0.02, 6))
    randomise(model, 0.3)
    mapped = model(x)
    assert not torch.allclose(mapped, plain, atol=1e-3)
    values = mirrors.primal(model, dict(model.named_parameters()))
    reference = surgery.apply(net(Blocks), REWIRE, example=x)
    known = {name: values[name] for name, _ in reference.named_parameters()}
    reference.load_state_dict({**reference.state_dict(), **known})
    assert torch.equal(reference(x), mapped)

    surgery.save(model, tmp_path / "saved")
    again = surgery.restore(tmp_path / "saved", model=net(Blocks, seed=4))
    assert torch.equal(again(x), mapped)
    for each in (model, again):
        surgery.apply(each, Rule(Freeze()), example=x)
        assert not mirrors.attached(each)
        assert torch.equal(each(x), mapped)
        surgery.undo(each, last=1)
        assert torch.equal(each(x), mapped)
        surgery.undo(each)
        assert torch.equal(each(x), plain)


def test_coefficients_are_mapped_in_the_recipe_of_their_shortcuts() -> None:
    model = surgery.apply(net(Blocks), REWIRE, example=vectors())
    with pytest.raises(RuleError, match=r"where.created_by: no earlier rule has the id 'rewire'"):
        surgery.plan(model, Rule(Mirror(), where=CreatedBy("rewire")))
    duals = {
        name
        for edit in surgery.plan(model, Rule(Mirror())).edits
        for name in edit.uses
        if not name.startswith("the ")
    }
    assert duals == {name for name, _ in net(Blocks).named_parameters()}


# Parameters that share storage.


class Views(nn.Module):
    """A layer whose weight is looked at by something else, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        if kind == "buffer":
            self.register_buffer("copy", self.body.weight.data.T)
        else:
            self.cached = self.body.weight.data[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize(("kind", "other"), [("buffer", "copy"), ("tensor", "cached")])
def test_a_weight_that_a_buffer_or_a_plain_tensor_is_a_view_of_is_refused(
    kind: str, other: str
) -> None:
    with pytest.raises(Conflict, match=rf"body.weight and {other} share their memory"):
        surgery.plan(Views(kind), Rule(Mirror()))
    few = surgery.plan(Views(kind), Rule(Mirror(parameters=("bias",))))
    assert [edit.site for edit in few.edits] == ["body.bias"]


def test_tied_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(Conflict, match=r"0.weight and 1.weight share their memory"):
        surgery.plan(model, Rule(Mirror(map="block_iaf")))


def test_a_layer_at_two_places_is_mapped_once() -> None:
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, 4)
    before = model(x)
    surgery.apply(model, Rule(Mirror(map="legendre")))
    assert [each.parameters for each in mirrors.attached(model)] == [("0.weight",), ("0.bias",)]
    assert torch.equal(model(x), before)
    randomise(model)
    values = mirrors.primal(model, dict(model.named_parameters()))
    weight, bias = values["0.weight"], values["0.bias"]
    hidden = torch.tanh(nn.functional.linear(x, weight, bias))
    assert torch.equal(model(x), nn.functional.linear(hidden, weight, bias))
    surgery.apply(model, Rule(Freeze()))
    assert torch.equal(model(x), nn.functional.linear(hidden, weight, bias))


# Quantised layers.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_quantised_layers_are_mapped_and_their_weights_are_not() -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 32, bias=False))
    model.requires_grad_(False)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(NoMatch, match=r"its weight is a .*quantised or sharded"):
        surgery.plan(model, Rule(Mirror()))
    x = torch.randn(3, 32)
    before = model(x)
    lora = Rule(LowRank(rank=2), where=Type("Linear"), id="lora")
    surgery.apply(model, [lora, Rule(Mirror(map="block_iaf"), where=CreatedBy("lora"))])
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "mirror" not in name:
                parameter.fill_(0.1)
    randomise(model)
    mapped = model(x)
    assert not torch.allclose(mapped, before, atol=1e-3)
    surgery.apply(model, Rule(Freeze()))
    assert torch.equal(model(x), mapped)
    surgery.undo(model)
    assert torch.equal(model(x), before)


# Values that are none.


@pytest.mark.parametrize("map", MAPS)
def test_values_that_are_not_finite_are_refused(map: str) -> None:  # noqa: A002
    model = net()
    with torch.no_grad():
        model.head.weight[0, :2] = torch.tensor([torch.nan, -torch.inf])
    kept = state(model)
    with pytest.raises(ModelStateError, match=r"2 of the 40 numbers of head.weight are NaN or"):
        surgery.apply(model, Rule(Mirror(map=map)))
    assert type(model) is Net
    assert list(state(model)) == list(kept)
    surgery.apply(model, Rule(Mirror(map=map), except_=At("head")))


# Devices and dtypes.


def test_a_map_couples_parameters_of_one_device() -> None:
    model = net()
    model.head.to("meta")
    with pytest.raises(RuleError, match="couples parameters on cpu, meta"):
        surgery.plan(model, Rule(Mirror(map="block_iaf")))
    apart = surgery.plan(model, Rule(Mirror(map="legendre")))
    assert {edit.site for edit in apart.edits} >= {"conv", "head"}
    apart.apply()
    devices = {name: p.device.type for name, p in model.named_parameters() if "mirror." in name}
    assert {kind for name, kind in devices.items() if name.startswith("head.")} == {"meta"}
    assert {kind for name, kind in devices.items() if name.startswith("conv.")} == {"cpu"}


class Mixed(Net):
    """A model with a head of its own dtype, as libraries keep some in float32."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x)).mean((2, 3))
        return self.head((self.norm(hidden) * self.scale_of_all).to(self.head.weight.dtype))


@pytest.mark.parametrize("head", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("map", MAPS)
def test_parameters_of_several_dtypes(map: str, head: torch.dtype) -> None:  # noqa: A002
    model, x = net(Mixed).to(torch.bfloat16), images().to(torch.bfloat16)
    model.head.to(head)
    before, kept = model(x), state(model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    surgery.apply(model, Rule(Mirror(map=map)))
    assert torch.equal(model(x), before)
    widest = {p.dtype for name, p in model.named_parameters() if "mirror." in name}
    assert torch.promote_types(torch.float32, head) in widest
    randomise(model)
    mapped = model(x)
    assert mapped.dtype == head
    assert not torch.equal(mapped, before)
    mapped.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    surgery.apply(model, Rule(Freeze()))
    # The values are rounded once, to the dtype of each, when they are read and when they are baked.
    assert torch.equal(model(x), mapped)
    assert dtypes == {name: p.dtype for name, p in model.named_parameters()}
    surgery.undo(model)
    assert same(state(model), kept)


def test_planned_on_the_meta_device_and_on_the_cpu_alike() -> None:
    with torch.device("meta"):
        model = Blocks()
    rules = [
        Rule(LowRank(rank=2), where=Type("Linear"), id="lora"),
        Rule(Mirror(map="block_iaf"), where=CreatedBy("lora"), id="duals"),
    ]
    there, here = (surgery.plan(each, rules) for each in (model, net(Blocks)))
    assert there.totals == here.totals
    assert there.warnings == here.warnings
    assert [edit.to_dict() for edit in there.edits] == [edit.to_dict() for edit in here.edits]
    there.apply()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(vectors().to("meta")).shape == (4, 8)
    surgery.undo(model)
    assert list(model.state_dict()) == list(net(Blocks).state_dict())
