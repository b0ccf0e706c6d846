"""``onnx`` of an encoder's embeddings, a step of diffusion, and a decoder without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surgery
from tests import zoo
from tests.exporting import models

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def bert() -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return models.rewire(zoo.perturb(transformers.BertModel(config)).eval())


CASES = {
    "embedding": (bert, "3 tokens less"),
    "decoder": (lambda: models.adapted(models.stock("llama")), "3 tokens less"),
    "diffusion": (lambda: models.rewired("dit"), "batch 3"),
}


@pytest.mark.parametrize("name", CASES)
def test_onnx(tmp_path: Path, name: str) -> None:
    build, call = CASES[name]
    example = None if name == "diffusion" else models.text()
    done = surgery.export(build(), tmp_path / "m.onnx", format="onnx", example=example)
    assert {"the example", "batch 1", call} <= set(done.agreement.calls)
    assert done.agreement.deviation < 1e-5
