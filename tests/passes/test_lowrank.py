"""The options of ``lowrank``, what it plans, refuses, freezes, seeds, logs and takes back."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import surgery
from architectures.adapters import LoRA, Matrix
from surgery import LowRank, Path, Rule, Type, adapters
from surgery.editing import note_state, repeat
from surgery.errors import Conflict, ModelStateError, RuleError
from surgery.passes.hosts import Bank, bank_of
from surgery.record import Record, record_of
from surgery.registry import ADAPTERS
from surgery.select import ModelMap, Role, Site
from tests import zoo


class Net(nn.Module):
    """Two blocks of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


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


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.normal_(0, 0.3)


def bank(model: nn.Module, path: str) -> Bank:
    found = bank_of(model.get_submodule(path))
    assert found is not None
    return found


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: must be at least 1, got 0"),
        ({"rank": -3}, "rank: must be at least 1, got -3"),
        ({"rank": 2.5}, "rank: expected an integer"),
        ({"rank": "8"}, "rank: expected an integer"),
        ({"rank": True}, "rank: expected an integer"),
        ({"alpha": 0}, "alpha: must be greater than 0, got 0"),
        ({"alpha": math.nan}, "alpha"),
        ({"dropout": 1}, "dropout: must be less than 1, got 1"),
        ({"dropout": -0.1}, "dropout: must be at least 0, got -0.1"),
        ({"method": "lore"}, "unknown method 'lore'.*did you mean 'lora'"),
        ({"scaling": "rs"}, "scaling"),
        ({"init": "zero"}, "init"),
        ({"freeze": "all"}, "freeze"),
        ({"keep_base": "disk"}, "keep_base"),
        ({"dtype": "int8"}, "dtype"),
        ({"slices": ()}, "slices"),
        ({"adapter": "a.b"}, "'a.b' cannot name an adapter"),
        ({"adapter": "training"}, "'training' cannot name an adapter"),
        ({"adapter": "merged"}, "'merged' cannot name an adapter"),
        ({"adapter": ""}, "'' cannot name an adapter"),
        ({"ranks": 8}, "unknown.*'ranks'"),
    ],
)
def test_bad_options_are_refused_where_they_are_given(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuleError, match=f"(?s){message}"):
        LowRank(**options)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"rank": 16}, 1.0),
        ({"rank": 16, "alpha": 32}, 2.0),
        ({"rank": 16, "alpha": 8, "scaling": "rslora"}, 2.0),
        ({"rank": 16, "scaling": "rslora"}, 4.0),
    ],
)
def test_scaling(options: dict[str, Any], factor: float) -> None:
    assert LowRank(**options).factor == factor
    model = surgery.apply(Net(), Rule(LowRank(**{**options, "rank": 4})))
    adapter = next(m for m in model.modules() if isinstance(m, LoRA))
    assert adapter.scaling == LowRank(**{**options, "rank": 4}).factor


# Planning.


def test_plan_names_every_tensor_it_will_add() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = surgery.plan(model, Rule(LowRank(rank=4, dtype="bfloat16")))
    assert list(model.state_dict()) == list(before)
    assert [edit.site for edit in plan.edits] == [f"blocks.{b}.{i}" for b in (0, 1) for i in (0, 2)]
    planned = {name: spec for edit in plan.edits for name, spec in edit.adds.items()}
    plan.apply()
    made = {
        name: (tuple(value.shape), str(value.dtype), value.requires_grad)
        for name, value in model.named_parameters()
        if name not in before
    }
    assert made == {
        name: (spec.shape, f"torch.{spec.dtype}", spec.trainable) for name, spec in planned.items()
    }
    assert plan.contract.kind == "exact"
    assert plan.totals.added == sum(math.prod(shape) for shape, _, _ in made.values())


def test_edits_are_json() -> None:
    for name in ("mixtral", "t5", "timm_convnext"):
        model, _ = zoo.build(name)
        for edit in surgery.plan(model, Rule(LowRank(rank=2))).edits:
            assert type(edit).from_dict(json.loads(json.dumps(edit.to_dict()))) == edit


@pytest.mark.parametrize("rank", [9, 1000])
def test_rank_larger_than_the_matrix(rank: int) -> None:
    with pytest.raises(RuleError, match=rf"rank {rank} is larger than the 24 x 8 .*blocks\.0\.0"):
        surgery.plan(Net(), Rule(LowRank(rank=rank)))
    surgery.plan(Net(), Rule(LowRank(rank=8)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.LayerNorm(4), "no weight of two or more dimensions"),
        (lambda: nn.Embedding(9, 4, max_norm=1.0), "max_norm rescales the weight itself"),
        (lambda: nn.LSTM(4, 4), "does not read weight_ih_l0 by that name"),
        (lambda: nn.LazyLinear(4), "not initialised yet"),
        (lambda: nn.Linear(4, 1), "is a vector"),
        (nn.Dropout, "no weight of two or more dimensions"),
    ],
)
def test_what_cannot_be_adapted_says_why(make: Any, reason: str) -> None:
    model = nn.Sequential(make())
    sites = [site for site in ModelMap(model).sites if site.path.startswith("0")]
    answers = {site.path: LowRank(rank=2).accepts(site) for site in sites}
    assert not any(answer.ok for answer in answers.values())
    assert any(reason in answer.reason for answer in answers.values()), answers


def test_dropout_needs_an_input_to_drop() -> None:
    model, _ = zoo.build("mixtral")
    with pytest.raises(RuleError, match=r"experts\.\w+ is adapted through its weight"):
        surgery.plan(model, Rule(LowRank(rank=2, dropout=0.1), where=Path("**.experts.*")))


def test_attribute_in_the_way() -> None:
    model = Net()
    model.blocks[0].get_submodule("0").lowrank = 3  # type: ignore[assignment]
    with pytest.raises(Conflict, match=r"blocks\.0\.0 has an attribute 'lowrank' of its own"):
        surgery.plan(model, Rule(LowRank(rank=2)))
    assert not any(isinstance(module, Bank) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_peft_model_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(Net(), LoraConfig(r=2, target_modules=["blocks.0.0"]))  # type: ignore[arg-type]
    with pytest.raises(Conflict, match="peft"):
        surgery.plan(wrapped, Rule(LowRank(rank=2)))


def test_same_name_twice_is_a_conflict_and_another_name_is_not() -> None:
    rules = [Rule(LowRank(rank=2), id="one"), Rule(LowRank(rank=3), id="two")]
    with pytest.raises(Conflict, match=r"(?s)'one' and 'two'.*blocks\.0\.0"):
        surgery.plan(Net(), rules)
    rules = [Rule(LowRank(rank=2), id="one"), Rule(LowRank(rank=3, adapter="b"), id="two")]
    model = surgery.apply(Net(), rules)
    assert adapters.names(model) == ("default", "b")
    with pytest.raises(Conflict, match="applied to this model before"):
        surgery.plan(model, Rule(LowRank(rank=2, adapter="b"), id="three"))


# Seeds.


def test_seed_and_site_decide_the_first_values() -> None:
    def first(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        recipe = surgery.Recipe(rules=[Rule(LowRank(rank=2))], seed=seed)
        model = surgery.apply(Net(), recipe)
        return {n: p for n, p in model.named_parameters() if n.endswith("lora_A")}

    one, again, other = first(0, 1), first(0, 2), first(1, 1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    for a, b in itertools.combinations(one.values(), 2):
        assert a.shape != b.shape or not torch.equal(a, b)


def test_global_generator_is_untouched() -> None:
    model = Net()
    before = torch.random.get_rng_state()
    surgery.apply(model, Rule(LowRank(rank=2)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_meta() -> None:
    with torch.device("meta"):
        model = Net()
    surgery.apply(model, Rule(LowRank(rank=2)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.empty(3, 8, device="meta")).shape == (3, 8)
    with pytest.raises(ModelStateError, match="meta device and has no values to merge into"):
        adapters.merge(model)
    surgery.undo(model)


# Freezing.


@pytest.mark.parametrize("freeze", ["model", "sites", "none"])
def test_freezing_and_thawing(freeze: Any) -> None:
    model = Net()
    model.norm.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    surgery.apply(model, Rule(LowRank(rank=2, freeze=freeze), where=Path("blocks.*.0")))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(grad for name, grad in after.items() if name not in before)
    frozen = {name for name, grad in before.items() if grad and not after[name]}
    sites = {f"blocks.{b}.0.{name}" for b in (0, 1) for name in ("weight", "bias")}
    everything = {name for name, grad in before.items() if grad}
    assert frozen == {"model": everything, "sites": sites, "none": set()}[freeze]
    surgery.undo(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_earlier_adapters_are_no_stock() -> None:
    model = surgery.apply(Net(), Rule(LowRank(rank=2)))
    surgery.apply(model, Rule(LowRank(rank=2, adapter="b")))
    assert all(tensor.requires_grad for tensor in adapters.parameters(model))


# Ties.


@pytest.mark.parametrize("selected", ["embed", "head", "{embed,head}"])
def test_tied_weight_is_adapted_once(selected: str) -> None:
    model = Tied()
    reference = copy.deepcopy(model)
    ids = torch.tensor([[1, 5, 7]])
    before = model(ids)
    plan = surgery.plan(model, Rule(LowRank(rank=2, alpha=3), where=Path(selected)))
    (edit,) = plan.edits
    assert edit.site == "embed"
    assert "embed and head share one weight" in edit.notes[0]
    assert str(plan).count("share one weight") == 1
    plan.apply()
    assert torch.equal(model(ids), before)
    assert bank(model, "embed") is bank(model, "head")
    randomise(model)
    A, B = bank(model, "embed").adapters["default"].factors()
    with torch.no_grad():
        reference.embed.weight += 1.5 * B @ A
    expected = reference(ids)
    torch.testing.assert_close(model(ids), expected)
    adapters.merge(model)
    assert model.head.weight is model.embed.weight
    # One rounding of the weight to float32 more.
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    adapters.unmerge(model)
    surgery.undo(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(ids), before)


def test_tie_read_in_two_ways_is_a_conflict() -> None:
    from tests.passes.layers import Conv1D

    model = nn.Sequential(nn.Linear(6, 6), Conv1D(6, 6))
    model[1].weight = model[0].weight  # type: ignore[assignment]
    with pytest.raises(Conflict, match=r"0 shares its weight with 1, which reads it the other way"):
        surgery.plan(model, Rule(LowRank(rank=2)))


def test_shared_module_is_adapted_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    before = model(torch.ones(1, 4))
    plan = surgery.plan(model, Rule(LowRank(rank=2)))
    assert [edit.site for edit in plan.edits] == ["0"]
    plan.apply()
    assert torch.equal(model(torch.ones(1, 4)), before)
    surgery.undo(model)
    assert torch.equal(model(torch.ones(1, 4)), before)


# Slices.


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """Says of every layer that its outputs are q, k and v, with v scattered."""
    slices = {"q": (0, 8), "k": (8, 12), "v": [12, 13, 16, 17, 18, 22]}
    role = Role("attention.qkv", "said so by the test", slices)
    monkeypatch.setattr(ModelMap, "role", lambda _self, _site: role)
    return slices


def test_slices_get_factors_of_their_own(fused: Mapping[str, Any]) -> None:
    model = Net().double()
    stock = copy.deepcopy(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    rule = Rule(LowRank(rank=2, alpha=3, slices=("q", "v")), where=Path("blocks.*.0"))
    plan = surgery.apply(model, rule)
    assert torch.equal(model(x), before)
    names = [name for name, _ in plan.named_parameters() if ".0.0.lowrank." in name]
    assert names == [
        f"blocks.0.0.lowrank.default.{part}.lora_{factor}" for part in "qv" for factor in "AB"
    ]
    randomise(model)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for block in (0, 1):
            for part, rows in (("q", list(range(8))), ("v", fused["v"])):
                prefix = f"blocks.{block}.0.lowrank.default.{part}"
                delta = 1.5 * tensors[f"{prefix}.lora_B"] @ tensors[f"{prefix}.lora_A"]
                stock.get_parameter(f"blocks.{block}.0.weight")[rows] += delta
    # float64: sums of 24 products.
    torch.testing.assert_close(model(x), stock(x), rtol=1e-12, atol=1e-12)
    adapters.merge(model)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-12, atol=1e-12)
    surgery.undo(model)
    assert torch.equal(model(x), before)


def test_unknown_slice(fused: Mapping[str, Any]) -> None:
    with pytest.raises(RuleError, match=r"has no slice 'gate'; its slices are q, k, v"):
        surgery.plan(Net(), Rule(LowRank(rank=2, slices=("q", "gate"))))


def test_rank_larger_than_a_slice(fused: Mapping[str, Any]) -> None:
    with pytest.raises(RuleError, match="rank 5 is larger than the 4 x 8 matrix"):
        surgery.plan(Net(), Rule(LowRank(rank=5, slices=("k",)), where=Path("blocks.*.0")))


# Merging and undo.


def test_undo_after_merge_is_bit_exact() -> None:
    model = Net()
    x = torch.randn(3, 8)
    before, stock = model(x), copy.deepcopy(model.state_dict())
    surgery.apply(model, Rule(LowRank(rank=2)))
    randomise(model)
    adapters.merge(model)
    assert not torch.equal(model(x), before)
    surgery.undo(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keep", ["rule", "call"])
def test_undo_after_merge_without_a_copy_is_refused(keep: str) -> None:
    model = Net().double()
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    surgery.apply(model, Rule(LowRank(rank=2, keep_base="none" if keep == "rule" else "memory")))
    randomise(model)
    expected = model(x)
    adapters.merge(model, keep_base=None if keep == "rule" else "none")
    record = record_of(model)
    assert record is not None
    assert not record.operations[0].kept
    with pytest.raises(ModelStateError, match=r"(?s)blocks\.0\.0\.weight without.*unmerge"):
        surgery.undo(model)
    adapters.unmerge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    surgery.undo(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_undo_of_one_application_leaves_the_other() -> None:
    model = Net()
    x = torch.randn(3, 8)
    surgery.apply(model, Rule(LowRank(rank=2)))
    randomise(model)
    first = model(x)
    surgery.apply(model, Rule(LowRank(rank=2, adapter="b")))
    assert torch.equal(model(x), first)
    randomise(model)
    surgery.undo(model, last=1)
    assert adapters.names(model) == ("default",)
    surgery.undo(model)


def test_trained_stock_values_survive_undo() -> None:
    model = Net()
    surgery.apply(model, Rule(LowRank(rank=2, freeze="none")))
    with torch.no_grad():
        model.norm.weight.add_(1)
    trained = model.norm.weight.clone()
    surgery.undo(model)
    assert torch.equal(model.norm.weight, trained)


def test_adapter_removed_by_hand_is_noticed() -> None:
    model = surgery.apply(Net(), Rule(LowRank(rank=2)))
    del vars(model.get_submodule("blocks.0.0"))["_modules"]["lowrank"]
    with pytest.raises(ModelStateError, match=r"blocks\.0\.0 no longer has its adapter"):
        surgery.undo(model)


def test_log_repeats_state_too() -> None:
    model = Net()
    x = torch.randn(3, 8)
    rules = [Rule(LowRank(rank=2, adapter=name), id=name) for name in ("a", "b", "c")]
    surgery.apply(model, rules)
    randomise(model)
    adapters.activate(model, {"a": 0.5, "c": 2.0})
    adapters.merge(model)
    expected = model(x)
    record = record_of(model)
    assert record is not None
    note_state(model, record)
    saved = Record.from_dict(json.loads(json.dumps(record.to_dict())))

    fresh = Net()
    repeat(fresh, saved)
    fresh.load_state_dict(model.state_dict())
    assert adapters.active(fresh) == {"a": 0.5, "c": 2.0}
    assert adapters.merged(fresh) == {"a": 0.5, "c": 2.0}
    assert torch.equal(fresh(x), expected)


def test_hooks_go_on_firing() -> None:
    model = Net()
    layer = model.get_submodule("blocks.0.0")
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    surgery.apply(model, Rule(LowRank(rank=2)))
    model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    surgery.undo(model)
    model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"] * 2


# Weights that are more than a tensor.


def test_parametrised_weight_takes_adapters_and_refuses_a_merge() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    parametrizations.weight_norm(model[0])
    x = torch.randn(3, 6)
    before = model(x)
    surgery.apply(model, Rule(LowRank(rank=2)))
    assert torch.equal(model(x), before)
    with pytest.raises(ModelStateError, match="computed by a parametrization"):
        adapters.merge(model)
    surgery.undo(model)
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao's own
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_base() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = Net()
    quantize_(model, Int8WeightOnlyConfig())
    x = torch.randn(3, 8)
    before = model(x)
    surgery.apply(model, Rule(LowRank(rank=2)))
    assert torch.equal(model(x), before)
    randomise(model)
    model(x).sum().backward()
    assert all(tensor.grad is not None for tensor in adapters.parameters(model))
    weights = [module for module in model.modules() if isinstance(module, nn.Linear)]
    dequantised = [module.weight.dequantize() for module in weights]  # type: ignore[operator]
    reference = Net()
    reference.load_state_dict(
        {n: p for n, p in model.state_dict().items() if "lowrank" not in n and "weight" not in n},
        strict=False,
    )
    reference.norm.load_state_dict(model.norm.state_dict())
    plain = [module for module in reference.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for target, source, weight in zip(plain, weights, dequantised, strict=True):
            found = bank_of(source)
            assert found is not None
            target.weight.copy_(weight + found.adapters["default"].change(weight))
    # Int8 weights times float32 inputs: one rounding per product.
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelStateError, match="quantised or sharded"):
        adapters.merge(model)
    surgery.undo(model)
    assert torch.equal(model(x), before)


class PackedLinear(nn.Module):
    """A quantised layer of a class nobody knows, with the names such classes share."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.register_buffer("packed", torch.randint(-100, 100, (5, 6), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(5, 1, dtype=torch.float64) / 100)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.get_buffer("packed") * self.get_buffer("scales")
        return x @ weight.T


def test_packed_layer_of_an_unknown_class() -> None:
    model = nn.Sequential(PackedLinear())
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    plan = surgery.plan(model, Rule(LowRank(rank=2)))
    assert plan.edits[0].payload["places"][0][2] == "output"
    plan.apply()
    assert torch.equal(model(x), before)
    randomise(model)
    A, B = bank(model, "0").adapters["default"].factors()
    assert A.dtype == torch.float64
    torch.testing.assert_close(model(x), before + x @ (B @ A).T)
    with pytest.raises(ModelStateError, match=r"nothing can be merged|quantised"):
        adapters.merge(model)


# Methods that do more than LoRA.


class Scaling(LoRA):
    """Rows scaled to the norms the weight had: DoRA without its trained magnitude."""

    scales_rows = True

    def gain(self, weight: Tensor) -> Tensor:
        A, B = self.factors()
        changed = weight + self.scaling * (B @ A)
        return weight.norm(dim=-1) / changed.norm(dim=-1)


class Residual(LoRA):
    """Starts from factors of ones and leaves the rest of the weight, as PiSSA does."""

    reads_weight = True
    changes_weight = True

    @torch.no_grad()
    def start(self, init: Any, generator: Any, weight: Tensor | None) -> Tensor | None:
        assert weight is not None
        self.lora_A.fill_(0.5)
        self.lora_B.fill_(0.25)
        return self.rest(weight)


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in {"scaling": Scaling, "residual": Residual}.items():
        monkeypatch.setitem(ADAPTERS._builtin, name, f"{__name__}:{name}")
        monkeypatch.setitem(ADAPTERS._loaded, name, method)


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize(
    "kind", ["linear", "Conv1D", "grouped conv2d", "conv2d, one image", "experts"]
)
def test_method_that_scales_rows(kind: str) -> None:
    from tests.passes.layers import KINDS, build

    model, x = build(kind, torch.float64)
    before = model(x)
    surgery.apply(model, Rule(LowRank(rank=2, method="scaling")))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    randomise(model)
    output = model(x)
    assert (output - before).abs().max() > 1e-2
    # The weight formed by hand: rows keep their norms.
    reference = build(kind, torch.float64)[0]
    reference.load_state_dict({n: p for n, p in model.state_dict().items() if "lowrank" not in n})
    banks = {n: m for n, m in model.named_modules() if isinstance(m, Bank)}
    with torch.no_grad():
        for name, found in banks.items():
            path = name.removesuffix("lowrank").rstrip(".")
            layer = reference.get_submodule(path if not path.startswith("lowrank") else "")
            weight = layer.get_parameter(
                found.parameter if "." not in name else name.split(".")[-1]
            )
            A, B = found.adapters["default"].factors()
            folded = weight.T if KINDS[kind].transposed else weight
            folded = folded if KINDS[kind].stacked else folded.reshape(B.shape[0], -1)
            changed = folded + B @ A
            changed *= folded.norm(dim=-1, keepdim=True) / changed.norm(dim=-1, keepdim=True)
            weight.copy_(changed.T if KINDS[kind].transposed else changed.reshape(weight.shape))
    torch.testing.assert_close(output, reference(x), rtol=1e-10, atol=1e-10)
    adapters.merge(model)
    torch.testing.assert_close(model(x), output, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("methods")
def test_method_that_scales_rows_refuses_an_embedding() -> None:
    with pytest.raises(RuleError, match="scales whole rows, which an embedding"):
        surgery.plan(Tied(), Rule(LowRank(rank=2, method="scaling")))


@pytest.mark.usefixtures("methods")
def test_method_that_changes_the_weight_refuses_a_parametrised_one() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    parametrizations.weight_norm(model[0])
    with pytest.raises(RuleError, match="changes the weight, and that of 0 is"):
        surgery.plan(model, Rule(LowRank(rank=2, method="residual")))


@pytest.mark.usefixtures("methods")
def test_method_that_changes_the_weight() -> None:
    model = Net().double()
    x = torch.randn(3, 8, dtype=torch.float64)
    before, stock = model(x), copy.deepcopy(model.state_dict())
    surgery.apply(model, Rule(LowRank(rank=2, method="residual")))
    assert not torch.equal(model.state_dict()["blocks.0.0.weight"], stock["blocks.0.0.weight"])
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    randomise(model)
    changed = model(x)
    adapters.merge(model)
    torch.testing.assert_close(model(x), changed, rtol=1e-12, atol=1e-12)
    adapters.unmerge(model)
    torch.testing.assert_close(model(x), changed, rtol=1e-12, atol=1e-12)
    adapters.merge(model, keep_base="none")
    adapters.unmerge(model)
    surgery.undo(model)
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("methods")
def test_method_that_changes_the_weight_for_good_says_so() -> None:
    rule = Rule(LowRank(rank=2, method="residual", keep_base="none"))
    plan = surgery.plan(Net(), rule)
    assert not any(edit.reversible for edit in plan.edits)
    model = plan.apply()
    with pytest.raises(ModelStateError, match="for good"):
        surgery.undo(model)


def test_accepts_says_which_weight() -> None:
    site = Site("0", nn.Linear(6, 5))
    assert LowRank(rank=2).accepts(site).reason == "its weight is [5, 6]"


def test_types_select_grafted_layers_again() -> None:
    model = surgery.apply(Net(), Rule(LowRank(rank=2), where=Type("Linear")))
    surgery.apply(model, Rule(LowRank(rank=2, adapter="b"), where=Type("Linear")))
    assert len(bank(model, "blocks.0.0").adapters) == 2
    assert Matrix.of((24, 8), stacked=False) == bank(model, "blocks.0.0").matrix
