"""Mirror maps in whole models of three libraries: exact at the start, right when trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery import (
    CreatedBy,
    Freeze,
    LowRank,
    Mirror,
    Recipe,
    Role,
    Rule,
    Shortcuts,
    Type,
    mirrors,
    shipped,
)
from surgery import Path as At
from surgery.errors import ExportError
from tests import zoo
from tests.passes.mirrored import call, randomise, same

pytestmark = [
    # torchao and diffusers announce their own changes while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NORMS = At(r"re:(?i).*norm.*")
MODELS = ["timm_vit", "timm_convnext", "bert", "llama", "t5", "UNet2DConditionModel"]
MODELS += ["DiTTransformer2DModel"]


@pytest.mark.parametrize("map", ["legendre", "block_iaf"])
@pytest.mark.parametrize("name", MODELS)
def test_norms(name: str, map: str) -> None:  # noqa: A002
    model, example = zoo.build(name)
    stock = copy.deepcopy(model)
    before = call(model, example)
    surgery.apply(model, Rule(Mirror(map=map), where=NORMS), example=example)
    assert same(call(model, example), before)
    randomise(model, 0.05)
    after = call(model, example)
    assert not same(after, before)
    # The stock class with the mapped values for its parameters.
    values = mirrors.primal(model, dict(model.named_parameters()))
    held = {key: values.get(key, value) for key, value in stock.state_dict().items()}
    stock.load_state_dict(held)
    assert same(call(stock, example), after)
    surgery.apply(model, Rule(Freeze()), example=example)
    assert same(call(model, example), after)
    assert not mirrors.attached(model)
    surgery.undo(model)
    assert type(model) is type(stock)
    assert same(call(model, example), before)


def test_norms_and_head_of_a_vit() -> None:
    """The rule file that ships, on a model of timm: nothing else stays trainable."""
    model, example = zoo.build("timm_vit")
    recipe = Recipe.load(shipped.rules()["mirror-norms-and-head"])
    plan = surgery.plan(model, recipe, example=example)
    duals = {name for edit in plan.edits for name in edit.uses if not name.startswith("the ")}
    assert {"head.weight", "head.bias", "norm.weight", "blocks.0.norm1.bias"} <= duals
    assert not any("attn" in name or "mlp" in name for name in duals)
    plan.apply()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == duals | {name for edit in plan.edits for name in edit.adds}
    surgery.verify(model, example).check()


def test_factors_of_lora_in_a_bert(tmp_path: Path) -> None:
    """The rule file that ships: the map is small beside the model, and goes with its adapters."""
    model, example = zoo.build("bert")
    before = call(model, example)
    recipe = Recipe.load(shipped.rules()["mirror-adapters"])
    surgery.apply(model, recipe, example=example)
    assert same(call(model, example), before)
    surgery.verify(model, example).check()
    (one,) = mirrors.attached(model)
    assert all(".lowrank.default.lora_" in name for name in one.parameters)
    randomise(model, 0.3)
    trained = call(model, example)
    assert not same(trained, before)
    surgery.save(model, tmp_path / "whole")
    other, _ = zoo.build("bert", seed=3)
    assert same(call(surgery.restore(tmp_path / "whole", model=other), example), trained)
    with pytest.raises(ExportError, match="without its rewrites"):
        model.save_pretrained(tmp_path / "stock")
    for format in ("merged", "peft", "transformers"):  # noqa: A001
        with pytest.raises(ExportError, match=r"mirror|block_iaf"):
            surgery.export(model, tmp_path / format, format=format, example=example)
    surgery.apply(model, Rule(Freeze()), example=example)
    surgery.export(model, tmp_path / "merged", format="merged", example=example)
    surgery.undo(model)
    assert same(call(model, example), before)


def test_a_frozen_map_leaves_a_stock_folder(tmp_path: Path) -> None:
    from transformers import BertModel

    model, example = zoo.build("bert")
    surgery.apply(model, Rule(Mirror(map="legendre"), where=NORMS), example=example)
    randomise(model, 0.05)
    with pytest.raises(ExportError, match="without its rewrites"):
        model.save_pretrained(tmp_path / "folder")
    surgery.apply(model, Rule(Freeze()), example=example)
    expected = call(model, example)
    model.save_pretrained(tmp_path / "folder")
    again = BertModel.from_pretrained(tmp_path / "folder").eval()
    assert same(call(again, example), expected)


def test_generate() -> None:
    model, example = zoo.build("llama")
    surgery.apply(model, Rule(Mirror(map="block_iaf"), where=NORMS), example=example)
    randomise(model, 0.05)
    ids = example.kwargs["input_ids"][:1, :4]
    made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    surgery.apply(model, Rule(Freeze()), example=example)
    frozen = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(made, frozen)


def test_attention_biases_that_are_cached_while_evaluating() -> None:
    import timm

    model = zoo.perturb(timm.create_model("levit_128s", num_classes=3)).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    bias = Rule(Mirror(map="diagonal", parameters=("attention_biases",)))
    with torch.no_grad():
        before = model(x)
        surgery.apply(model, bias, example=x)
        assert torch.equal(model(x), before)
        for name, parameter in model.named_parameters():
            if "mirror." in name and name.endswith("shift"):
                parameter.fill_(0.1)
            if "mirror." in name and name.endswith("log_slopes"):
                parameter.fill_(1.0)
        assert not torch.allclose(model(x), before)
        surgery.undo(model)
        assert torch.equal(model(x), before)


def test_adapters_of_a_diffusion_model() -> None:
    model, example = zoo.build("UNet2DConditionModel")
    rules: list[Any] = [
        Rule(LowRank(rank=2), where=Type("Linear"), id="lora"),
        Rule(Mirror(map="diagonal"), where=CreatedBy("lora")),
    ]
    before = call(model, example)
    surgery.apply(model, rules, example=example)
    assert same(call(model, example), before)
    model(*example.args, **example.kwargs)[0].sum().backward()
    reached = [
        name for name, p in model.named_parameters() if p.grad is not None and "mirror" in name
    ]
    assert len(reached) == sum(len(each.map_parameters) for each in mirrors.attached(model))


def test_roles_are_found_in_a_mapped_model() -> None:
    model, example = zoo.build("timm_vit")
    lora = Rule(LowRank(rank=2), where=Role("attention.qkv"))
    expected = [edit.site for edit in surgery.plan(model, lora, example=example).edits]
    before = call(model, example)
    everywhere = Rule(Mirror(map="block_iaf"), where=Role("attention.qkv", "norm"))
    surgery.apply(model, everywhere, example=example)
    assert [edit.site for edit in surgery.plan(model, lora, example=example).edits] == expected
    surgery.apply(model, [lora, Rule(Shortcuts(init="identity"))], example=example)
    assert same(call(model, example), before)
    surgery.verify(model, example).check()
