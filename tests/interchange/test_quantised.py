"""Adapters beside a quantised base, found by role, to PEFT and back."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery import CheckpointError, ExportError, LowRank, Role, Rule, RuleError
from tests import zoo
from tests.interchange.peers import CLOSE, stirred
from tests.interchange.peers import in_peft as wrapped_by_peft

pytestmark = [
    # torchao and PEFT announce changes of other libraries while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    # It could not merge into them; nothing is merged here.
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
]

IDS = torch.arange(8).unsqueeze(0)
ATTENTION = Role("attention.q", "attention.v")


def plain() -> Any:
    """A tiny LLaMA."""
    return zoo.build("llama")[0].eval()


def quantised() -> Any:
    """The same with int8 weights in its blocks."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain()
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(one: Tensor, other: Tensor) -> bool:
    return ((one - other).abs().max() / other.abs().max()).item() < CLOSE


@pytest.fixture(scope="module")
def adapted() -> Any:
    model = quantised()
    surgery.apply(model, Rule(LowRank(rank=2), where=ATTENTION))
    return stirred(model)


def test_roles_are_found_and_the_start_is_exact() -> None:
    model = quantised()
    before = logits(model)
    plan = surgery.plan(model, Rule(LowRank(rank=2), where=Role("attention", "mlp")))
    assert len(plan.edits) == 7 * len(model.model.layers)
    plan.apply()
    assert torch.equal(logits(model), before)


def test_peft_loads_our_adapter_beside_its_own_quantised_layers(
    adapted: Any, tmp_path: FilePath
) -> None:
    from peft import PeftModel
    from peft.tuners.lora.torchao import TorchaoLoraLinear

    surgery.export(adapted, tmp_path / "peft", format="peft", example={"input_ids": IDS})
    plain = quantised()
    before = logits(plain)
    theirs: Any = PeftModel.from_pretrained(plain, str(tmp_path / "peft")).eval()
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, TorchaoLoraLinear)
    assert close(logits(theirs), logits(adapted))
    assert not close(logits(adapted), before)


def test_an_adapter_of_peft_is_loaded_beside_quantised_layers(tmp_path: FilePath) -> None:
    theirs = wrapped_by_peft(quantised(), r=3, target_modules=["q_proj", "o_proj"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load_adapter(quantised(), tmp_path / "theirs")
    assert close(logits(ours), logits(theirs))
    surgery.undo(ours)
    assert torch.equal(logits(ours), logits(quantised()))


def test_merging_into_quantised_weights_is_refused(adapted: Any, tmp_path: FilePath) -> None:
    with pytest.raises(ExportError, match="would round the adapters away") as raised:
        surgery.export(adapted, tmp_path / "merged", format="merged", example={"input_ids": IDS})
    assert "quantise it" in raised.value.hint
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", ["scalora", "pissa", "olora", "sorsa", "dora", "nora"])
def test_methods_that_need_the_weight_are_refused(method: str) -> None:
    model = quantised()
    with pytest.raises(RuleError, match=f"'{method}' (changes|reads) the weight") as raised:
        surgery.plan(model, Rule(LowRank(method=method, rank=2), where=ATTENTION))
    assert "layers.0.self_attn.q_proj is quantised" in raised.value.message


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_factors_of_a_start_that_split_the_weight_are_refused(
    start: str, tmp_path: FilePath
) -> None:
    theirs = wrapped_by_peft(plain(), r=2, target_modules=["q_proj"], init_lora_weights=start)
    theirs.save_pretrained(tmp_path / "theirs")
    model = quantised()
    with pytest.raises(CheckpointError, match=f"'{start}' changes the weight"):
        surgery.load_adapter(model, tmp_path / "theirs")
    assert torch.equal(logits(model), logits(quantised()))
