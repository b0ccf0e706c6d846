"""Images drawn: with a denoiser that knows the answer, against DiTPipeline, and as files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import surgery
from surgery.errors import ModelStateError
from surgery.train.data.base import Facts
from surgery.train.objectives import gaussian, images, noise
from surgery.train.objectives.configs import DiffusionObjective, ImageSampling
from surgery.train.objectives.diffusion import Diffusion

# diffusers' DPM-Solver builds NumPy arrays of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DIGITS = Facts("digits", channels=1, size=(8, 8), classes=10)
SCHEDULERS = ["ddpm", "ddim", "dpm"]


class Oracle(nn.Module):
    """Predicts rightly for data in which each class is one image of one brightness.

    The null class is black. With a learned variance, that of the posterior or of beta is chosen.
    """

    def __init__(self, prediction: str, variance: float | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_class_embeds=11, sample_size=8)
        levels = torch.linspace(-0.9, 0.9, 10)
        self.brightness = nn.Parameter(torch.cat([levels, torch.tensor([0.0])]))
        self.prediction = prediction
        self.variance = variance
        self.bars = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        bar = self.bars[timestep].reshape(-1, 1, 1, 1)
        clean = self.brightness[class_labels].reshape(-1, 1, 1, 1)
        noise = (sample - bar.sqrt() * clean) / (1 - bar).sqrt()
        velocity = bar.sqrt() * noise - (1 - bar).sqrt() * clean
        output = (noise if self.prediction == "epsilon" else velocity).float()
        if self.variance is not None:
            output = torch.cat([output, torch.full_like(output, self.variance)], dim=1)
        return SimpleNamespace(sample=output)


def aim(model: nn.Module, facts: Facts = DIGITS, **changes: Any) -> Diffusion:
    fields: dict[str, Any] = {"scheduler": "ddim", "steps": 20, "guidance": 1.0, "count": 10}
    prediction = fields.pop("prediction", changes.pop("prediction", "epsilon"))
    config = DiffusionObjective(
        kind="diffusion", prediction=prediction, ema=None, sample=ImageSampling(**fields | changes)
    )
    return Diffusion(config, facts, model, seed=0)


def dit(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "num_layers": 3,
        "sample_size": 8,
    }
    return surgery.load("diffusers:DiTTransformer2DModel", config=config | changes)


def rewired(**changes: Any) -> nn.Module:
    model = dit(**changes)
    surgery.apply(model, surgery.Rule(surgery.Shortcuts()))
    return model


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("variance", [None, -1.0, 1.0])
def test_a_model_that_knows_the_image_draws_it(
    scheduler: Any, prediction: str, variance: float | None
) -> None:
    model = Oracle(prediction, variance)
    drawn = aim(model, prediction=prediction, scheduler=scheduler).draw(model)
    expected = (model.brightness.detach()[:10] + 1) / 2
    assert drawn.shape == (10, 1, 8, 8)
    # The last step leaves a thousandth of noise at most: its level is the schedule's own float32.
    torch.testing.assert_close(
        drawn, expected.reshape(-1, 1, 1, 1).expand_as(drawn), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("variance", [None, 0.0])
def test_guidance_leads_away_from_the_null_class(scheduler: Any, variance: float | None) -> None:
    model = Oracle("epsilon", variance)
    drawn = aim(model, scheduler=scheduler, guidance=2.0).draw(model)
    # Noise predictions are linear in the image: 0 + 2 (x - 0), as far as pixels go.
    wanted = ((2 * model.brightness.detach()[:10]).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(
        drawn, wanted.reshape(-1, 1, 1, 1).expand_as(drawn), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_is_the_same_in_any_grid(scheduler: Any) -> None:
    model = rewired(num_embeds_ada_norm=10)
    before = torch.get_rng_state()
    few, many = (
        aim(model, scheduler=scheduler, steps=5, count=count, guidance=1.5).draw(model)
        for count in (3, 5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    # Another batch size is another order of sums in the matrix products.
    torch.testing.assert_close(few, many[:3], rtol=0, atol=1e-5)
    again = aim(model, scheduler=scheduler, steps=5, count=3, guidance=1.5).draw(model)
    assert torch.equal(few, again)
    other = aim(model, scheduler=scheduler, steps=5, count=3, guidance=1.5, seed=1).draw(model)
    assert not torch.allclose(few, other, atol=0.05)


def test_large_grids_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Oracle("epsilon")
    whole = aim(model, count=7).draw(model)
    monkeypatch.setattr(images, "_AT_ONCE", 3)
    torch.testing.assert_close(whole, aim(model, count=7).draw(model), rtol=0, atol=1e-6)


# --- latents --------------------------------------------------------------------------------------


def vae_folder(path: Path, **changes: Any) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    fields: dict[str, Any] = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "latent_channels": 1,
        "scaling_factor": 0.25,
    }
    AutoencoderKL(**fields | changes).save_pretrained(path)
    return path


@pytest.mark.parametrize("build", [dit, rewired])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_model_draws_the_same_in_dit_pipeline(
    build: Any, outputs: int, guidance: float, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    # 1000 classes: the pipeline's null class is 1000, whatever the model's is.
    model = build(out_channels=outputs).eval()
    folder = vae_folder(tmp_path / "vae")
    config = DiffusionObjective(
        kind="diffusion", ema=None, sample=ImageSampling(steps=6, count=4, guidance=guidance)
    )
    facts = Facts("latents", channels=1, size=(8, 8), classes=10)
    ours = Diffusion(config, facts, model, seed=0, vae=str(folder)).draw(model)
    scheduler = DDIMScheduler(
        **gaussian.schedule(1000, "epsilon"), timestep_spacing="trailing", clip_sample=False
    )
    vae = AutoencoderKL.from_pretrained(folder)
    pipeline: Any = DiTPipeline(transformer=model, vae=vae, scheduler=scheduler)  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [0, 1, 2, 3],
        guidance_scale=guidance,
        num_inference_steps=6,
        generator=[noise.generator(0, index) for index in range(4)],
        output_type="pt",
    ).images
    # The same numbers in batches of the same size.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [None, 0.5])
def test_latents_are_decoded(tmp_path: Path, shift: float | None) -> None:
    decoder = images.Decoder.load(str(vae_folder(tmp_path / "vae", shift_factor=shift)))
    model = dit(num_embeds_ada_norm=10)
    config = DiffusionObjective(
        kind="diffusion", ema=None, sample=ImageSampling(steps=3, count=2, guidance=1.0)
    )
    facts = Facts("latents", channels=1, size=(8, 8), classes=10)
    latent = Diffusion(config, facts, model, seed=0, vae=str(tmp_path / "vae"))
    drawn = latent.draw(model)
    assert drawn.shape == (2, 3, 16, 16)
    latents = torch.randn(2, 1, 8, 8)
    vae: Any = decoder.vae
    expected = vae.decode(latents / 0.25 + (shift or 0.0)).sample
    assert torch.equal(decoder(latents), expected)


def test_latents_are_not_clipped(tmp_path: Path) -> None:
    model = Oracle("epsilon")
    model.brightness.data *= 4
    vae = vae_folder(tmp_path / "vae", scaling_factor=1.0)
    config = DiffusionObjective(
        kind="diffusion", ema=None, sample=ImageSampling(steps=20, count=10, guidance=1.0)
    )
    facts = Facts("latents", channels=1, size=(8, 8), classes=10)
    objective = Diffusion(config, facts, model, seed=0, vae=str(vae))
    brightness = model.brightness.detach()[:10].reshape(-1, 1, 1, 1).expand(10, 1, 8, 8)
    decoded = images.Decoder.load(str(vae))(brightness)
    torch.testing.assert_close(
        objective.draw(model), (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=5e-3
    )


def test_a_vae_of_another_class_is_refused(tmp_path: Path) -> None:
    dit().save_pretrained(tmp_path / "dit")  # type: ignore[operator]
    with pytest.raises(ModelStateError, match="DiTTransformer2DModel, expected an AutoencoderKL"):
        images.Decoder.load(str(tmp_path / "dit"))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "channels", "size", "columns", "rows", "side"),
    [(20, 1, 8, 10, 2, 64), (4, 3, 16, 2, 2, 64), (5, 3, 100, 3, 2, 100), (1, 1, 8, 1, 1, 64)],
)
def test_grids_as_png(
    tmp_path: Path, count: int, channels: int, size: int, columns: int, rows: int, side: int
) -> None:
    drawn = torch.linspace(0, 1, count).reshape(-1, 1, 1, 1).expand(count, channels, size, size)
    path = images.write(drawn, tmp_path / "new" / "grid.png")
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"))
    gap = 0 if count == 1 else 2
    assert pixels.shape == (rows * (side + gap) + gap, columns * (side + gap) + gap, 3)
    for index in range(count):
        row, column = divmod(index, columns)
        top, left = gap + row * (side + gap), gap + column * (side + gap)
        tile = pixels[top : top + side, left : left + side]
        assert (tile == round(index / max(count - 1, 1) * 255)).all()


def test_grids_during_training(tmp_path: Path) -> None:
    model = rewired(num_embeds_ada_norm=10)
    objective = aim(model, steps=2, count=3)
    assert objective.sample_every == 1000
    assert objective.sample(model, None, 5) is None
    path = objective.sample(model, tmp_path, 5)
    assert path == tmp_path / "step-000005.png"
    assert path.is_file()
