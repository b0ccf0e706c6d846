"""``diffusers``: a component that ``AutoModel`` loads and a pipeline takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgery
from surgery.exporting import outputs
from surgery.sources import Example, infer_example
from tests.exporting import models
from tests.exporting.together import Together

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# The exact calls that load it into a pipeline, in a process that cannot import this library.
USED = """
import sys
sys.modules["surgery"] = sys.modules["architectures"] = None
import diffusers, torch
folder, again = sys.argv[1:]
component = diffusers.AutoModel.from_pretrained(folder, trust_remote_code=True)
vae = diffusers.AutoencoderKL(
    block_out_channels=[4], norm_num_groups=2, latent_channels=component.config.in_channels
)
pipeline = diffusers.DiTPipeline(
    transformer=component, vae=vae, scheduler=diffusers.DDIMScheduler()
)
pipeline.set_progress_bar_config(disable=True)
images = pipeline(class_labels=[1, 2], num_inference_steps=2, output_type="np").images
assert images.shape[0] == 2
component.save_pretrained(again)
call = {"hidden_states": torch.ones(2, component.config.in_channels, 8, 8),
        "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
with torch.no_grad():
    print(float(component(**call).sample.double().abs().sum()))
"""


def test_a_pipeline_takes_what_was_loaded(tmp_path: Path) -> None:
    model = models.rewired("dit")
    done = surgery.export(model, tmp_path / "out", format="diffusers")
    assert "modeling_rewritten.py" in done.files
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USED, tmp_path / "out", tmp_path / "again"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert ran.returncode == 0, ran.stderr
    channels = model.config.in_channels
    call = {
        "hidden_states": torch.ones(2, channels, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }
    wanted = outputs(model, Example((), call))["sample"].double().abs().sum()
    assert float(ran.stdout.splitlines()[-1]) == pytest.approx(float(wanted), rel=1e-4)


def test_adapters_that_are_not_merged_are_trained_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Together(tmp_path, monkeypatch)  # loaded below
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    model = models.adapted(models.stock("dit"))
    given = {"format": "diffusers", "max_shard_size": "20KB"}
    done = surgery.export(model, tmp_path / "out", **given)
    assert "diffusion_pytorch_model.safetensors.index.json" in done.files
    component = diffusers.AutoModel.from_pretrained(str(tmp_path / "out"), trust_remote_code=True)
    call = infer_example(model)
    torch.testing.assert_close(
        outputs(component.eval(), call), outputs(model, call), rtol=1e-4, atol=1e-5
    )
    trained = {name for name, each in component.named_parameters() if each.requires_grad}
    assert trained == {name for name, each in model.named_parameters() if each.requires_grad}
