"""``keep_base: source``: undo reads the original weights again from where they were loaded."""

from __future__ import annotations

import copy
from pathlib import Path as FilePath

import pytest
import torch

import surgery
from surgery import LowRank, Path, Rule, adapters
from surgery.errors import Conflict, ModelStateError, RuleError
from surgery.record import record_of


def test_source_is_what_undo_reads_again(tmp_path: FilePath) -> None:
    config = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    }
    made = surgery.load("transformers:LlamaModel", config=config)
    made.save_pretrained(tmp_path / "stock")
    model = surgery.load(tmp_path / "stock")
    rule = Rule(LowRank(method="pissa", rank=2, keep_base="source"), where=Path("**.q_proj"))
    with pytest.raises(RuleError, match="was loaded without pretrained weights"):
        surgery.plan(made, rule)
    surgery.apply(model, rule)
    record = record_of(model)
    assert record is not None
    assert not any(operation.kept for operation in record.operations)
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    folder = surgery.save(model, tmp_path / "alone", adapter_only=True)
    surgery.restore(folder, model=surgery.load(tmp_path / "stock"))
    back = surgery.restore(surgery.save(model, tmp_path / "whole"))
    for each in (model, back):
        surgery.undo(each)
        for (name, one), other in zip(each.named_parameters(), made.parameters(), strict=True):
            assert torch.equal(one, other), name

    surgery.apply(model, rule)
    with torch.no_grad():
        made.layers[0].self_attn.q_proj.weight.add_(1)
    made.save_pretrained(tmp_path / "stock")
    split = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelStateError, match="no longer holds the weight"):
        surgery.undo(model)
    assert all(torch.equal(value, split[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "first",
    [
        LowRank(method="pissa", rank=2, adapter="first"),
        LowRank(method="scalora", rank=2, adapter="first"),
        LowRank(method="reflora", rank=2, adapter="first", options={"re_init": True}),
    ],
    ids=lambda first: first.method,
)
def test_source_beside_what_an_earlier_rule_changes_is_refused(
    tmp_path: FilePath, first: LowRank
) -> None:
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    made = surgery.load("transformers:LlamaModel", config={**config, **heads})
    made.save_pretrained(tmp_path)
    model = surgery.load(tmp_path)
    second = LowRank(method="olora", rank=2, adapter="second", keep_base="source")
    where = Path("**.q_proj")
    with pytest.raises(Conflict, match="cannot be read again from the source"):
        surgery.plan(model, [Rule(each, where=where, id=each.adapter) for each in (first, second)])
