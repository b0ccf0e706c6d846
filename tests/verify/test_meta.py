"""On the meta device: layers as wide as those of the largest models, planned, applied, verified."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import LowRank, Rule, Shortcuts, Type
from surgery.checkpoints.inventory import places
from surgery.sources import infer_example
from surgery.table import human_count
from surgery.verification.runs import count_flops

RANK = 16
RULES = [
    Rule(Shortcuts(topology="ancre", init="identity"), id="shortcuts"),
    Rule(LowRank(rank=RANK), where=Type("Linear"), id="adapters"),
]
LAYERS = 4
LLAMA = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
DEEPSEEK = {"num_hidden_layers": LAYERS}


def llama() -> tuple[int, int, int, int]:
    """Parameters of LLaMA: embedding, linear layers, norms; and those linear layers' in + out."""
    h, i, v, kv = 16384, 53248, 128256, 8 * 128
    linear = LAYERS * (2 * h * h + 2 * h * kv + 3 * h * i) + v * h
    ends = LAYERS * (2 * (h + h) + 2 * (h + kv) + 3 * (h + i)) + h + v
    return v * h, linear, LAYERS * 2 * h + h, ends


def built(spec: str, config: dict[str, Any]) -> nn.Module:
    return surgery.load(spec, config=config, device="meta", dtype="bfloat16")


def test_llama_of_405b_by_its_formulas() -> None:
    model = built("transformers:LlamaForCausalLM", LLAMA)
    embedding, linear, norms, ends = llama()
    plan = surgery.plan(model, RULES)
    coefficients = LAYERS * (LAYERS + 1) // 2
    assert plan.totals.parameters == embedding + linear + norms
    assert len(plan.edits) == 1 + 7 * LAYERS + 1
    logits = [n for n in plan.edits[0].adds if plan.edits[0].adds[n].trainable]
    assert sum(plan.edits[0].adds[name].numel for name in logits) in (coefficients, LAYERS**2)
    adapters = sum(s.numel for e in plan.edits[1:] for s in e.adds.values())
    assert adapters == RANK * ends
    plan.apply()
    report = surgery.verify(model)
    assert report.ok
    rows = {row.check: row for row in report.rows}
    assert "stock keys" in rows["state-dict keys"].detail
    assert {"shapes and dtypes", "ties", "edit log", "parameter identity"} <= set(rows)
    unchecked = {each.check: each.reason for each in report.unchecked}
    assert set(unchecked) == {"finite weights", "outputs and gradients"}
    assert all("meta" in reason for reason in unchecked.values())

    stock = built("transformers:LlamaForCausalLM", LLAMA)
    ids = infer_example(stock).kwargs["input_ids"]
    call = surgery.Example((), {"input_ids": torch.zeros(ids.shape, dtype=torch.long).to("meta")})
    tokens, length = ids.numel(), ids.shape[1]
    attention = 2 * tokens * 2 * LAYERS * 128 * length * 128
    before = 2 * tokens * linear + attention
    assert count_flops(stock, call) == before
    said = rows["FLOPs of a forward"].detail
    assert said.startswith(f"{human_count(before)} before")
    after = count_flops(model, call)
    assert after is not None
    assert after - before >= 2 * tokens * RANK * ends


def test_experts_count_in_the_flops_of_deepseek() -> None:
    model = built("transformers:DeepseekV3ForCausalLM", DEEPSEEK)
    plan = surgery.plan(model, RULES)
    plan.apply()
    report = surgery.verify(model)
    assert report.ok
    assert any(row.check == "FLOPs of a forward" for row in report.rows)
    assert all(place.tensor.is_meta for _, place in places(model))
    h, inner, chosen = 7168, 2048, 8
    few = built("transformers:DeepseekV3ForCausalLM", {**DEEPSEEK, "num_experts_per_tok": 1})
    stock = built("transformers:DeepseekV3ForCausalLM", DEEPSEEK)
    tokens = 24
    call = surgery.Example((), {"input_ids": torch.zeros(2, 12, dtype=torch.long, device="meta")})
    counts = [count_flops(each, call) for each in (stock, few)]
    assert all(counts)
    routed = 2 * tokens * 3 * h * inner * (chosen - 1)  # one layer of the four has experts
    assert counts[0] - counts[1] == pytest.approx(routed, rel=1e-3)
