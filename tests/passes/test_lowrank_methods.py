"""Every method on every host: its start, its formula, merging, undo, saving, conversion."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import LowRank, Path, Rule, adapters
from surgery.errors import Conflict, ModelStateError, RuleError
from surgery.passes.hosts import Bank, bank_of
from surgery.passes.methods import method_named
from surgery.record import record_of
from surgery.registry import ADAPTERS
from tests.passes.layers import KINDS, build

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK
Tensors = Mapping[str, Tensor]
Formula = Callable[[Tensor, Tensors], Tensor]


def plain(weight: Tensor, t: Tensors) -> Tensor:
    return weight + SCALE * (t["lora_B"] @ t["lora_A"])


def dora(weight: Tensor, t: Tensors) -> Tensor:
    changed = plain(weight, t)
    return t["lora_magnitude_vector"][..., None] * changed / changed.norm(dim=-1, keepdim=True)


def sorsa(weight: Tensor, t: Tensors) -> Tensor:
    return weight + SCALE * (t["lora_B"] @ torch.diag_embed(t["lora_S"]) @ t["lora_A"])


#: The changed weight from the base weight and the method's tensors, where it is not W + s B A.
FORMULAS: dict[str, Formula] = {"dora": dora, "sorsa": sorsa}
METHODS = ADAPTERS.names()
#: Methods that do more with a weight than LoRA.
OF_THEIR_OWN = [
    name
    for name in METHODS
    if method_named(name).changes_weight
    or method_named(name).scales_rows
    or method_named(name).reads_weight
]
SPLITTING = [name for name in METHODS if method_named(name).changes_weight]
KINDS_READABLE = [name for name in KINDS if name != "parametrised"]
FEW = ("linear", "Conv1D", "conv2d", "experts")
CASES = [
    (method, kind)
    for method in METHODS
    for kind in (KINDS_READABLE if method in OF_THEIR_OWN else FEW)
    if not (method_named(method).scales_rows and KINDS[kind].hosts.get("") == "embedding")
]


def adapt(module: nn.Module, method: str, **options: Any) -> surgery.Plan:
    plan = surgery.plan(module, Rule(LowRank(method=method, rank=RANK, alpha=ALPHA, **options)))
    plan.apply()
    return plan


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in adapters.parameters(module):
            tensor.add_(torch.randn_like(tensor), alpha=0.3)


def banks(module: nn.Module) -> Iterator[tuple[str, nn.Module, Bank]]:
    """Path, holder and bank of every adapted weight."""
    for path, each in module.named_modules():
        for name, _ in each.named_parameters(recurse=False):
            found = bank_of(each, name) if "lowrank" in each._modules else None
            if found is not None and found.parameter == name:
                yield path, each, found


def changed_by_hand(stock: nn.Module, adapted: nn.Module, method: str) -> nn.Module:
    """The stock module whose weights are what the method's formula gives."""
    reference = copy.deepcopy(stock)
    formula = FORMULAS.get(method, plain)
    with torch.no_grad():
        for path, holder, bank in banks(adapted):
            weight = holder._parameters[bank.parameter]
            assert weight is not None
            tensors = dict(bank.adapters["default"].named_parameters())
            folded = bank.matrix.fold(weight.detach())
            changed = bank.matrix.unfold(formula(folded, tensors))
            reference.get_submodule(path).get_parameter(bank.parameter).copy_(changed)
    return reference


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_start_formula_merge_and_undo(method: str, kind: str) -> None:
    module, x = build(kind, torch.float64)
    stock = copy.deepcopy(module)
    before = module(x)
    plan = adapt(module, method)
    splits = method in SPLITTING
    assert plan.contract.kind == ("close" if splits else "exact")
    if splits:
        # The rounding of what is left of the weight, times sums of at most 100 products.
        torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(module(x), before)

    perturb(module)
    reference = changed_by_hand(stock, module, method)
    output = module(x)
    torch.testing.assert_close(output, reference(x), rtol=1e-10, atol=1e-10)
    assert x.numel() == 0 or (output - before).abs().max() > 1e-3
    output.sum().backward()
    assert all(tensor.grad is not None for tensor in adapters.parameters(module))

    # Switched off, the model is the original one, also where the weight was split.
    with adapters.disabled(module):
        torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)
    with adapters.using(module, {"default": 0.5}), torch.no_grad():
        half = module(x)
    adapters.merge(module, {"default": 0.5})
    torch.testing.assert_close(module(x), half, rtol=1e-10, atol=1e-10)
    adapters.unmerge(module)
    adapters.merge(module)
    torch.testing.assert_close(module(x), output, rtol=1e-10, atol=1e-10)
    adapters.unmerge(module)
    assert torch.equal(module(x), output)
    adapters.merge(module, keep_base="none")
    adapters.unmerge(module)
    torch.testing.assert_close(module(x), output, rtol=1e-10, atol=1e-10)

    adapters.merge(module)
    surgery.undo(module)
    restored = dict(module.named_parameters())
    assert restored.keys() == dict(stock.named_parameters()).keys()
    if splits:
        assert all(torch.equal(p, restored[name]) for name, p in stock.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", OF_THEIR_OWN)
def test_start_in_every_dtype(method: str, dtype: torch.dtype) -> None:
    for kind in FEW:
        module, x = build(kind, dtype)
        before = module(x)
        plan = adapt(module, method)
        if plan.contract.kind == "exact":
            assert torch.equal(module(x), before), kind
        else:
            scale = before.abs().max().item()
            bound = plan.contract.atol + plan.contract.rtol * scale
            assert (module(x) - before).abs().max() <= bound, kind
        for tensor in adapters.parameters(module):
            assert tensor.dtype == dtype


@pytest.mark.parametrize("method", SPLITTING)
def test_split_weight_is_the_original_without_the_factors(method: str) -> None:
    for kind in FEW:
        stock, _ = build(kind, torch.float64)
        module = copy.deepcopy(stock)
        adapt(module, method)
        for path, holder, bank in banks(module):
            original = stock.get_submodule(path).get_parameter(bank.parameter)
            weight = holder._parameters[bank.parameter]
            assert weight is not None
            left = bank.matrix.fold(weight)
            made = bank.adapters["default"]
            A, B = made.factors()
            torch.testing.assert_close(
                left + SCALE * (B @ A), bank.matrix.fold(original), rtol=1e-12, atol=1e-12
            )
            assert not torch.equal(left, bank.matrix.fold(original))


class Fused(nn.Module):
    """A fused qkv projection of a block, and a head that is tied to the embedding."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.out(mixed))


def test_dropping_inputs_of_a_part_of_the_weight_is_no_exact_start() -> None:
    module, _ = build("linear")
    for dropout, kind in ((0.0, "close"), (0.1, "changes")):
        rule = Rule(LowRank(method="pissa", rank=RANK, dropout=dropout))
        assert surgery.plan(module, rule).contract.kind == kind


@pytest.mark.parametrize("method", OF_THEIR_OWN)
def test_verified_against_the_model_as_it_was(method: str) -> None:
    model, ids = Fused(torch.float32), torch.randint(0, 12, (2, 5))
    rule = Rule(LowRank(method=method, rank=RANK), where=Path("{qkv,out}"))
    surgery.apply(model, rule, example=(ids,))
    report = surgery.verify(model, (ids,))
    report.check()
    expected = "within" if method in SPLITTING else "equal"
    outputs = {row.result for row in report.rows if row.check.startswith("output")}
    assert outputs <= {expected, "equal"}


def test_compiled_mixes_follow_the_original_weight() -> None:
    torch.compiler.reset()
    module, x = build("linear", torch.float64)
    before = module(x)
    adapt(module, "pissa")
    perturb(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)
    with adapters.using(module, {"default": 0.25}):
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)
    with adapters.disabled(module):
        torch.testing.assert_close(compiled(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [*OF_THEIR_OWN, "lora"])
def test_slices_of_a_fused_weight(method: str) -> None:
    model, ids = Fused(), torch.randint(0, 12, (2, 5))
    stock = copy.deepcopy(model)
    before = model(ids)
    rule = Rule(
        LowRank(method=method, rank=RANK, alpha=ALPHA, slices=("q", "v")), where=Path("qkv")
    )
    surgery.apply(model, rule, example=(ids,))
    torch.testing.assert_close(model(ids), before, rtol=1e-12, atol=1e-12)
    perturb(model)
    output = model(ids)
    weight = model.qkv.weight.detach().clone()
    assert torch.equal(weight[8:16], stock.qkv.weight[8:16])
    bank = bank_of(model.qkv)
    assert bank is not None
    reference = copy.deepcopy(stock)
    with torch.no_grad():
        for name, rows in {"q": slice(0, 8), "v": slice(16, 24)}.items():
            tensors = dict(bank.adapters["default"].get_submodule(name).named_parameters())
            weight[rows] = FORMULAS.get(method, plain)(weight[rows], tensors)
        reference.qkv.weight.copy_(weight)
    torch.testing.assert_close(output, reference(ids), rtol=1e-10, atol=1e-10)
    adapters.merge(model)
    torch.testing.assert_close(model(ids), output, rtol=1e-10, atol=1e-10)
    surgery.undo(model)
    assert all(
        torch.equal(p, dict(model.named_parameters())[n]) for n, p in stock.named_parameters()
    )


@pytest.mark.parametrize("method", [name for name in OF_THEIR_OWN if name != "dora"])
def test_tied_weight_is_split_once(method: str) -> None:
    model, ids = Fused(), torch.randint(0, 12, (2, 5))
    before = model(ids)
    surgery.apply(
        model, Rule(LowRank(method=method, rank=RANK), where=Path("head")), example=(ids,)
    )
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(ids), before, rtol=1e-12, atol=1e-12)
    surgery.undo(model)
    assert torch.equal(model(ids), before)


# Saving.


@pytest.mark.parametrize("method", METHODS)
def test_saved_models_come_back_bit_for_bit(
    method: str, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 12, (2, 5))
    model = Fused(torch.float32)
    where = Path("{qkv,out}")
    surgery.apply(model, Rule(LowRank(method=method, rank=RANK), where=where), example=(ids,))
    perturb(model)
    output = model(ids)
    whole = surgery.save(model, tmp_path / "whole")
    alone = surgery.save(model, tmp_path / "alone", adapter_only=True)
    stock = copy.deepcopy(model)
    surgery.undo(stock)

    def refuse(*_: object) -> None:
        raise AssertionError("a restored model needs no first values")

    monkeypatch.setattr(method_named(method), "start", refuse)
    torch.manual_seed(1)
    back = surgery.restore(whole, model=Fused(torch.float32))
    assert torch.equal(back(ids), output)
    beside = surgery.restore(alone, model=copy.deepcopy(stock))
    assert torch.equal(beside(ids), output)
    for restored in (back, beside):
        assert torch.equal(surgery.undo(restored)(ids), stock(ids))


# Conversion to plain LoRA.


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "experts", "embedding"])
@pytest.mark.parametrize("method", [*SPLITTING, "reflora"])
def test_converted_to_plain_lora(method: str, kind: str, tmp_path: FilePath) -> None:
    module, x = build(kind, torch.float64)
    stock = copy.deepcopy(module)
    adapt(module, method, options={"re_init": True} if method == "reflora" else {})
    perturb(module)
    output = module(x)
    assert adapters.to_lora(module) is module
    torch.testing.assert_close(module(x), output, rtol=1e-10, atol=1e-10)
    parameters = dict(module.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in stock.named_parameters())
    assert not any("initial" in name for name in module.state_dict())
    record = record_of(module)
    assert record is not None
    assert not any(operation.kept for operation in record.operations)
    assert {edit.payload["method"] for edit in record.edits} == {"lora"}
    for tensor in adapters.parameters(module):
        assert 2 * RANK in tensor.shape
        assert tensor.requires_grad
    folder = surgery.save(module, tmp_path / "out")
    back = surgery.restore(folder, model=copy.deepcopy(stock))
    assert torch.equal(back(x), module(x))
    with pytest.raises(ModelStateError, match="plain already"):
        adapters.to_lora(module)
    surgery.undo(module)
    assert torch.equal(module(x), stock(x))


def test_conversion_needs_the_original_weight() -> None:
    module, x = build("linear", torch.float64)
    adapt(module, "pissa", keep_base="none")
    output = module(x)
    with pytest.raises(ModelStateError, match="no copy of the original weight"):
        adapters.to_lora(module)
    assert torch.equal(module(x), output)


def test_conversion_refuses_what_is_merged_or_shared() -> None:
    module, _ = build("linear", torch.float64)
    adapt(module, "pissa")
    adapters.merge(module)
    with pytest.raises(ModelStateError, match="merged"):
        adapters.to_lora(module)
    adapters.unmerge(module)
    surgery.apply(module, Rule(LowRank(method="olora", rank=RANK, adapter="b")))
    with pytest.raises(ModelStateError, match="'b' changes the weight of"):
        adapters.to_lora(module, "default")
    with pytest.raises(ModelStateError, match="no adapter 'c'"):
        adapters.to_lora(module, "c")


def test_one_of_several_adapters_is_converted() -> None:
    module, x = build("linear", torch.float64)
    adapt(module, "lora", adapter="a")
    adapt(module, "pissa")
    perturb(module)
    output = module(x)
    kept = dict(module.named_parameters())["lowrank.a.lora_A"]
    adapters.to_lora(module)
    torch.testing.assert_close(module(x), output, rtol=1e-12, atol=1e-12)
    assert dict(module.named_parameters())["lowrank.a.lora_A"] is kept
    with adapters.using(module, "a"):
        assert not torch.equal(module(x), output)
    surgery.undo(module)


# Several at one weight.


def test_two_that_split_one_weight() -> None:
    module, x = build("linear", torch.float64)
    stock = copy.deepcopy(module.state_dict())
    before = module(x)
    rules = [
        Rule(LowRank(method="pissa", rank=RANK)),
        Rule(LowRank(method="olora", rank=RANK, adapter="b")),
    ]
    surgery.apply(module, rules)
    torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)
    perturb(module)
    with adapters.disabled(module):
        torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)
    with adapters.using(module, "b"):
        alone = module(x)
    adapters.activate(module, "b")
    torch.testing.assert_close(module(x), alone, rtol=1e-12, atol=1e-12)
    adapters.merge(module, {})
    torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)
    surgery.undo(module)
    assert all(torch.equal(value, stock[name]) for name, value in module.state_dict().items())


def test_row_norms_are_not_measured_beside_a_weight_that_is_split_later() -> None:
    module, _ = build("linear", torch.float64)
    first, then = Rule(LowRank(method="dora", rank=2)), LowRank(method="pissa", rank=2, adapter="b")
    with pytest.raises(Conflict, match="measures the norms"):
        surgery.plan(module, [first, Rule(then)])
    surgery.apply(module, first)
    with pytest.raises(Conflict, match="measures the norms"):
        surgery.plan(module, Rule(then))
    surgery.undo(module)
    surgery.apply(module, [Rule(then), first])
    adapters.merge(module)
    again = Rule(LowRank(method="olora", rank=2, adapter="c"))
    with pytest.raises(Conflict, match="adapters are merged"):
        surgery.plan(module, again)


# Bad input.


@pytest.mark.parametrize("method", OF_THEIR_OWN)
@pytest.mark.parametrize("keep_base", ["memory", "none"])
def test_weight_of_nan_is_named_and_nothing_is_changed(method: str, keep_base: str) -> None:
    if method == "dora":
        pytest.skip("its norms are NaN as the model's outputs are")
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    stock = copy.deepcopy(model.state_dict())
    rule = Rule(LowRank(method=method, rank=2, keep_base=keep_base))  # type: ignore[arg-type]
    with pytest.raises(ModelStateError, match=r"^1 cannot start as .*1 of the 20 values .* NaN"):
        surgery.apply(model, rule)
    assert type(model[0]) is nn.Linear
    assert record_of(model) is None
    # Without a copy what was taken out is added again, which rounds.
    close = {"rtol": 0.0, "atol": 0.0 if keep_base == "memory" else 1e-15, "equal_nan": True}
    torch.testing.assert_close(dict(model.state_dict()), dict(stock), **close)


@pytest.mark.parametrize("method", ["pissa", "sorsa", "nora"])
def test_weight_of_zeros_is_refused(method: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ModelStateError, match=r"^0 cannot start as .*zero"):
        surgery.apply(model, Rule(LowRank(method=method, rank=2)))


@pytest.mark.parametrize("method", METHODS)
def test_rank_above_the_smaller_side_is_refused(method: str) -> None:
    with pytest.raises(RuleError, match="rank 6 is larger than the 5 x 6 matrix"):
        surgery.plan(nn.Sequential(nn.Linear(6, 5)), Rule(LowRank(method=method, rank=6)))


@pytest.mark.parametrize("method", OF_THEIR_OWN)
def test_quantised_weights_are_refused(method: str) -> None:
    layer = nn.Linear(6, 5)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(RuleError, match=r"(reads|changes) the weight, and that of 0 is quantised"):
        surgery.plan(nn.Sequential(layer), Rule(LowRank(method=method, rank=2)))


def test_an_option_that_touches_a_quantised_weight_is_named() -> None:
    layer = nn.Linear(6, 5)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    drawn = LowRank(method="reflora", rank=2, options={"re_init": True, "warmup": 0})
    with pytest.raises(RuleError, match="changes the weight") as refused:
        surgery.plan(nn.Sequential(layer), Rule(drawn))
    assert refused.value.hint == "leave re_init out of its options"
    surgery.plan(nn.Sequential(layer), Rule(LowRank(method="reflora", rank=2)))


def test_dora_refuses_an_embedding() -> None:
    with pytest.raises(RuleError, match="scales whole rows, which an embedding"):
        surgery.plan(Fused(), Rule(LowRank(method="dora", rank=2), where=Path("embed")))
    with pytest.raises(RuleError, match="scales whole rows, which an embedding"):
        surgery.plan(Fused(), Rule(LowRank(method="dora", rank=2), where=Path("head")))


@pytest.mark.parametrize("method", OF_THEIR_OWN)
def test_init_that_means_nothing_is_refused(method: str) -> None:
    rule = Rule(LowRank(method=method, rank=2, init="gaussian"))
    model = nn.Sequential(nn.Linear(6, 5))
    if "gaussian" in method_named(method).inits:
        surgery.plan(model, rule)
        return
    with pytest.raises(RuleError, match="does not draw its factors"):
        surgery.plan(model, rule)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"warmup": 1}, "method 'lora' has no option 'warmup'.*has no options"),
        ("pissa", {"svd": "fast"}, "options.svd: expected 'exact' or 'randomised'"),
        ("pissa", {"iterations": -1}, "iterations must be at least 0, got -1"),
        ("pissa", {"iteration": 1}, "has no option 'iteration'.*did you mean 'iterations'"),
        ("nora", {"sigma": 0}, "sigma must be a positive number, got 0"),
        ("nora", {"sigma": "1"}, "options.sigma: expected a number"),
        ("sorsa", {"gamma": -1.0}, "gamma must be a number that is not negative"),
    ],
)
def test_options_of_methods_are_checked(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=f"(?s){message}"):
        LowRank(method=method, options=options)


@pytest.mark.parametrize("method", METHODS)
def test_options_are_plain_frozen_dataclasses_with_defaults(method: str) -> None:
    options = method_named(method).Options
    assert dataclasses.is_dataclass(options)
    assert options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    written = dataclasses.asdict(options())
    recipe = surgery.Recipe(rules=[Rule(LowRank(method=method))])
    assert recipe.dump()["rules"][0]["with"]["options"] == written
    assert surgery.Recipe.loads(recipe.to_yaml()) == recipe


def test_wrong_option_is_found_in_the_rule_file() -> None:
    text = (
        "version: 1\nrules:\n  - pass: lowrank\n    with:\n      method: pissa\n"
        "      options: {svd: exact, iterations: many}\n"
    )
    with pytest.raises(RuleError, match=r"with\.options\.iterations: expected an integer") as found:
        surgery.Recipe.loads(text, "a.yaml")
    assert (found.value.line, found.value.column) == (6, 41)


# On the meta device.


@pytest.mark.parametrize("method", METHODS)
def test_adapters_put_in_on_meta_start_later(method: str) -> None:
    ids = torch.randint(0, 12, (2, 5))
    stock = Fused(torch.float32)
    rule = Rule(LowRank(method=method, rank=2), where=Path("out"))
    expected = surgery.apply(copy.deepcopy(stock), rule, example=(ids,))
    with torch.device("meta"):
        model = Fused(torch.float32)
    plan = surgery.plan(model, rule)
    assert any("adapters.start" in note for edit in plan.edits for note in edit.notes) == (
        method in OF_THEIR_OWN
    )
    plan.apply()
    with pytest.raises(ModelStateError, match="still on the meta device"):
        adapters.start(model)
    model.to_empty(device="cpu")
    missing = model.load_state_dict(stock.state_dict(), strict=False)
    assert all("lowrank" in name for name in missing.missing_keys)
    adapters.start(model)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(ModelStateError, match="has its values already"):
        adapters.start(model)
    surgery.undo(model)
    assert torch.equal(model(ids), stock(ids))
