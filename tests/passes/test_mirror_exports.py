"""Mirrored models saved, exported and loaded, before and after ``freeze``: the page's table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery import CreatedBy, Freeze, LowRank, Mirror, Rule, Type, mirrors
from surgery import Path as At
from surgery.errors import CheckpointError, ExportError, ModelStateError
from tests import zoo
from tests.passes.mirrored import Blocks, call, net, randomise, same, vectors

pytestmark = [
    # torchao and diffusers announce their own changes while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NORMS = Rule(Mirror(), where=At(r"re:(?i).*norm.*"), id="norms")
LORA = [
    Rule(LowRank(rank=2), where=Type("Linear"), id="lora"),
    Rule(Mirror(), where=CreatedBy("lora"), id="duals"),
]
FREEZE = Rule(Freeze())
FIRST = "freeze the maps first, with surgery.apply"
# A model of each library, and the format that holds it.
LIBRARIES = {
    "timm_vit": "python",
    "bert": "transformers",
    "DiTTransformer2DModel": "diffusers",
}


def mapped(name: str, rules: Any = NORMS) -> tuple[Any, Any]:
    model, example = zoo.build(name)
    surgery.apply(model, rules, example=example)
    randomise(model, 0.05)
    return model, example


@pytest.mark.parametrize("name", LIBRARIES)
def test_formats_that_hold_stock_models_want_the_map_baked_in(name: str, tmp_path: Path) -> None:
    model, example = mapped(name)
    expected = call(model, example)
    own = LIBRARIES[name]
    for format in (own, "merged"):  # noqa: A001
        with pytest.raises(ExportError, match=FIRST):
            surgery.export(model, tmp_path / format, format=format, example=example)
    assert not list(tmp_path.iterdir())
    assert same(call(model, example), expected)
    surgery.apply(model, FREEZE, example=example)
    for format in (own, "merged"):  # noqa: A001
        done = surgery.export(model, tmp_path / format, format=format, example=example)
        assert done.agreement.deviation <= done.agreement.bound
    surgery.undo(model, last=1)
    assert same(call(model, example), expected)


@pytest.mark.parametrize("name", ["bert", "DiTTransformer2DModel"])
def test_save_pretrained_wants_it_too(name: str, tmp_path: Path) -> None:
    model, example = mapped(name)
    with pytest.raises(ExportError, match=r"without its rewrites(.|\n)*freeze the maps first"):
        model.save_pretrained(tmp_path / "stock")
    surgery.apply(model, FREEZE, example=example)
    model.save_pretrained(tmp_path / "stock")
    stock = type(model).from_pretrained(tmp_path / "stock").eval()
    assert same(call(stock, example), call(model, example))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["before", "after"])
def test_save_restore_and_undo(name: str, frozen: bool, tmp_path: Path) -> None:
    stock, example = zoo.build(name)
    model, _ = mapped(name)
    expected = call(model, example)
    if frozen:
        surgery.apply(model, FREEZE, example=example)
    surgery.save(model, tmp_path / "saved")
    again = surgery.restore(tmp_path / "saved", model=zoo.build(name, seed=3)[0])
    assert same(call(again, example), expected)
    assert bool(mirrors.attached(again)) != frozen
    surgery.undo(again)
    assert same(call(again, example), call(stock, example))


def test_programs_compute_the_map(tmp_path: Path) -> None:
    model = surgery.apply(net(Blocks), Rule(Mirror(map="legendre"), where=Type("LayerNorm")))
    randomise(model)
    expected = model(vectors())
    done = surgery.export(model, tmp_path / "m.onnx", format="onnx", example=vectors())
    assert done.agreement.deviation <= done.agreement.bound
    surgery.apply(model, FREEZE)
    again = surgery.export(model, tmp_path / "f.onnx", format="onnx", example=vectors())
    assert again.agreement.deviation <= again.agreement.bound
    assert torch.equal(model(vectors()), expected)


# Adapters whose factors are mapped.


def test_factors_that_are_baked_in_are_an_adapter_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model, example = mapped("bert", LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "mirror." not in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    expected = call(model, example)
    for format in ("peft", "transformers"):  # noqa: A001
        with pytest.raises(ExportError, match=FIRST):
            surgery.export(model, tmp_path / format, format=format, example=example)
    surgery.apply(model, FREEZE, example=example)
    surgery.export(model, tmp_path / "peft", format="peft", example=example)
    stock = zoo.build("bert")[0]
    loaded = PeftModel.from_pretrained(stock, str(tmp_path / "peft")).eval()
    for key, value in call(loaded, example).items():
        # peft adds the branch in another order.
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)

    surgery.save(model, tmp_path / "alone", adapter_only=True)
    again = surgery.restore(tmp_path / "alone", model=zoo.build("bert")[0])
    assert same(call(again, example), expected)


def test_stock_weights_that_a_map_was_baked_into_are_no_adapter(tmp_path: Path) -> None:
    model, example = mapped("bert", [LORA[0], NORMS])
    with pytest.raises(ExportError, match=r"rule 'norms' also changed") as raised:
        surgery.export(model, tmp_path / "peft", format="peft", example=example)
    assert FIRST not in str(raised.value)  # it would not help
    surgery.apply(model, FREEZE, example=example)
    with pytest.raises(ExportError, match=r"rule 'norms' also changed"):
        surgery.export(model, tmp_path / "peft", format="peft", example=example)
    with pytest.raises(CheckpointError, match=r"stock weight(.|\n)*surgery.undo of a map"):
        surgery.save(model, tmp_path / "alone", adapter_only=True)
    surgery.export(model, tmp_path / "merged", format="merged", example=example)


# Weights that are loaded.


def test_weights_that_are_loaded_become_the_duals(tmp_path: Path) -> None:
    model, example = mapped("bert")
    zoo.build("bert", seed=5)[0].save_pretrained(tmp_path / "other")
    surgery.load_weights(model, tmp_path / "other")
    stock = zoo.build("bert", seed=5)[0].state_dict()
    duals = [name for each in mirrors.attached(model) for name in each.parameters]
    assert all(torch.equal(dict(model.named_parameters())[name], stock[name]) for name in duals)
    surgery.apply(model, FREEZE, example=example)
    with pytest.raises(ModelStateError, match=r"is in the present weight itself(.|\n)*undo what"):
        surgery.load_weights(model, tmp_path / "other")


# The page says so.


def test_the_table_of_the_page_names_every_format() -> None:
    page = (Path(__file__).parents[2] / "docs" / "mirror.md").read_text(encoding="utf-8")
    table = page[page.index("| what | before") :].split("\n\n")[0]
    told = set(re.findall(r"`(\w+)`", table))
    assert {"python", "transformers", "diffusers", "torch_export", "onnx", "merged", "peft"} <= told
