"""``onnx``: named inputs and outputs, sizes that vary, a decoder with and without its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.exporting import outputs
from surgery.sources import Example
from tests.exporting import models

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def session(file: Path) -> Any:
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def shapes(nodes: Any) -> dict[str, list[Any]]:
    return {node.name: node.shape for node in nodes}


def test_a_decoder_generates_token_by_token_with_its_cache(tmp_path: Path) -> None:
    model = models.rewired("llama")
    done = surgery.export(
        model, tmp_path / "m.onnx", format="onnx", example=models.text(), cache=True
    )
    assert len(done.agreement.calls) == 3
    run = session(tmp_path / "m.onnx")
    inputs, results = shapes(run.get_inputs()), shapes(run.get_outputs())
    assert inputs["input_ids"] == ["batch", "length"]
    assert inputs["past_key_values.0.key"] == ["batch", 1, "past", 8]
    assert results["logits"] == ["batch", "length", 96]
    prompt = models.ids(1, 5)
    past = {name: torch.zeros(1, 1, 0, 8).numpy() for name in inputs if name.startswith("past_key")}
    tokens, ids = prompt, prompt
    for _ in range(4):
        feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
        found = dict(zip(results, run.run(None, {**feed, **past}), strict=True))
        ids = torch.from_numpy(found["logits"])[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, ids], 1)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    wanted = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.tolist() == wanted.tolist()


def test_a_classifier(tmp_path: Path) -> None:
    model = models.rewired("vit")
    surgery.export(model, tmp_path / "out", format="onnx")
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"model.onnx", "surgery.json"}
    run = session(tmp_path / "out" / "model.onnx")
    assert shapes(run.get_inputs()) == {"x": ["batch", 3, 32, 32]}
    x = torch.randn(5, 3, 32, 32)
    (found,) = run.run(None, {"x": x.numpy()})
    wanted = outputs(model, Example((x,)))["output"]
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(surgery.ExportError, match="bfloat16"):
        surgery.export(models.stock("mlp").bfloat16(), tmp_path / "m.onnx", format="onnx")
    with pytest.raises(surgery.ExportError, match="takes no 'input_ids'"):
        surgery.export(models.stock("mlp"), tmp_path / "m.onnx", format="onnx", cache=True)
    from surgery.exporting import onnx

    monkeypatch.setattr(onnx, "_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(surgery.ExportError, match=r"no_such_package not installed.*\[export\]"):
        surgery.export(models.stock("mlp"), tmp_path / "m.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []
