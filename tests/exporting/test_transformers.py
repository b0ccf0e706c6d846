"""``transformers``: a folder of remote code that works like any other model of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.exporting import models
from tests.exporting.together import Together

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# Everything a person does with it, in a process that cannot import this library.
USED = """
import sys
sys.modules["surgery"] = sys.modules["architectures"] = None
import json, torch, transformers
folder, again = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor(json.loads(sys.stdin.read()))
tokens = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
model.save_pretrained(again)
second = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
half = transformers.AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.bfloat16
)
with torch.no_grad():
    first = model(ids, output_hidden_states=True)
    loss = model.train()(ids, labels=ids).loss
model.gradient_checkpointing_enable()
model(ids, labels=ids).loss.backward()
print(json.dumps({
    "tokens": tokens.tolist(),
    "same": torch.equal(first.logits, second(ids).logits),
    "hidden": [float(state.double().sum()) for state in first.hidden_states],
    "gradient": float(model.model.layers.shortcuts["0"].topology.logits.grad.norm()),
    "dtypes": sorted({str(p.dtype) for p in half.parameters()}),
    "logits": str(half.model.layers.shortcuts["0"].topology.logits.dtype),
}))
"""


def test_what_was_loaded_generates_trains_and_is_saved_again(tmp_path: Path) -> None:
    model: Any = models.rewired("llama")
    surgery.export(model, tmp_path / "out", format="transformers", example=models.text())
    ids = models.ids(2, 6)
    told = in_a_process(USED, tmp_path, ids)
    wanted = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert told["tokens"] == wanted.tolist()
    assert told["same"]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    sums = [float(state.double().sum()) for state in states]
    assert told["hidden"] == pytest.approx(sums, rel=1e-4, abs=1e-4)
    assert told["gradient"] > 0
    assert told["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert told["logits"] == "torch.float32"


# Adapters that are not merged: trained alone, saved again, and exported again by this library.
TRAINED = """
import sys
sys.modules["surgery"] = sys.modules["architectures"] = None
import json, torch, transformers
folder, again = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.train_adapters()
trained = [name for name, p in model.named_parameters() if p.requires_grad]
before = {name: p.detach().clone() for name, p in model.named_parameters()}
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
ids = torch.tensor(json.loads(sys.stdin.read()))
losses = []
for _ in range(4):
    optimizer.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
model.save_pretrained(again)
second = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    same = torch.equal(model.eval()(ids).logits, second(ids).logits)
print(json.dumps({"trained": trained, "moved": moved, "losses": losses, "same": same,
                  "dtypes": sorted({str(p.dtype) for n, p in model.named_parameters()
                                    if "lora" in n})}))
"""


def in_a_process(script: str, tmp_path: Path, ids: torch.Tensor) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path / "out", tmp_path / "again"],
        input=json.dumps(ids.tolist()),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_adapters_that_are_not_merged_are_trained_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Together(tmp_path, monkeypatch)  # loaded below
    model: Any = models.stock("llama").bfloat16()
    models.adapted(model, dtype="float32")
    done = surgery.export(
        model,
        tmp_path / "out",
        format="transformers",
        example=models.text(),
        max_shard_size="10KB",
    )
    assert "model.safetensors.index.json" in done.files
    told = in_a_process(TRAINED, tmp_path, models.ids(2, 6))
    inserted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(told["trained"]) == inserted
    assert set(told["moved"]) == inserted
    assert told["losses"][-1] < told["losses"][0]
    assert told["same"]
    assert told["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("form", ["transformers", "torch_export"])
def test_what_was_loaded_is_exported_again(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Together(tmp_path, monkeypatch)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    given = {"format": "transformers", "example": models.text()}
    first: Any = models.adapted(models.rewired("llama"))
    surgery.export(first, tmp_path / "out", **given)
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    target = tmp_path / ("again" if form == "transformers" else "again.pt2")
    done = surgery.export(loaded, target, **given | {"format": form})
    if form == "torch_export":
        assert done.agreement.deviation < 1e-5
        return
    again = auto.from_pretrained(target, trust_remote_code=True).eval()
    torch.testing.assert_close(
        again(**models.text()).logits, first(**models.text()).logits, rtol=1e-4, atol=1e-5
    )


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    surgery.export(
        models.rewired("llama"),
        tmp_path / "out",
        format="transformers",
        example=models.text(),
        tokenizer=str(tokenizer),
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "rewritten_llama"
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_rewritten.")
    text = (tmp_path / "out" / "modeling_rewritten.py").read_text()
    assert "Licensed under the Apache License" in text
    assert f"'transformers': '{transformers.__version__}'" in text
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    # Without remote code it is refused, not loaded as the stock architecture.
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    with pytest.raises(surgery.CheckpointError, match="is an export in the format 'transformers'"):
        surgery.restore(tmp_path / "out")


def test_a_stock_architecture_is_a_plain_folder(tmp_path: Path) -> None:
    model = models.adapted(models.stock("llama"))
    surgery.adapters.merge(model)
    done = surgery.export(model, tmp_path / "out", format="transformers", example=models.text())
    assert not any(name.endswith(".py") for name in done.files)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == models.stock("llama").state_dict().keys()
    torch.testing.assert_close(
        loaded(**models.text()).logits, model(**models.text()).logits, rtol=1e-4, atol=1e-5
    )
