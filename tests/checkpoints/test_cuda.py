"""Save, restore and verify on an accelerator; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from surgery import LowRank, Rule, adapters
from tests import zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model, example = zoo.build("llama")
    model.to("cuda", dtype)
    inputs = example.to("cuda")
    surgery.apply(model, Rule(LowRank(rank=2)))
    report = surgery.verify(model, example)
    assert report.ok, str(report)
    with torch.no_grad():
        for parameter in adapters.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        before = model(**inputs.kwargs).logits
    folder = surgery.save(model, tmp_path / "out")
    restored = surgery.restore(folder, device="cuda")
    assert {p.device.type for p in restored.parameters()} == {"cuda"}
    with torch.no_grad():
        assert torch.equal(before, restored(**inputs.kwargs).logits)
    assert {p.device.type for p in surgery.restore(folder).parameters()} == {"cpu"}
    alone = surgery.save(model, tmp_path / "adapter", adapter_only=True)
    stock = zoo.build("llama")[0].to("cuda", dtype)
    with torch.no_grad():
        assert torch.equal(before, surgery.restore(alone, model=stock)(**inputs.kwargs).logits)


def test_generators_of_the_device_are_left_alone() -> None:
    model, example = zoo.build("bert")
    model.to("cuda")
    surgery.apply(model, Rule(LowRank(rank=2)))
    before = torch.cuda.get_rng_state()
    surgery.verify(model, example)
    assert torch.equal(before, torch.cuda.get_rng_state())
