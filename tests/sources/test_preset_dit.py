"""DiT presets: adaLN-Zero, one embedder for all blocks, and diffusers' own tools."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from architectures.backbones import PRESETS
from surgery import SourceError, load
from surgery.sources import describe, infer_example, rebuild
from tests.sources.backbones import called, count, moved


@pytest.fixture(scope="module")
def recipes(request: pytest.FixtureRequest) -> Path:
    return request.config.rootpath / "configs" / "rules"


def test_dit_starts_as_in_its_paper() -> None:
    model: Any = load("preset:dit-tiny")
    example = infer_example(model)
    assert not called(model.eval(), example).any()
    x = torch.randn(2, 16, 128)
    for block in model.transformer_blocks:
        kwargs = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 9])}
        assert torch.equal(block(x, **kwargs), x)
    for name, each in model.named_parameters():
        zeroed = "norm1.linear" in name or name.startswith("proj_out") or name.endswith("bias")
        assert bool(each.any()) is not zeroed, name
    bound = (6 / (128 + 512)) ** 0.5  # of Xavier's uniform distribution
    largest = float(model.transformer_blocks[0].ff.net[0].proj.weight.detach().abs().max())
    assert 0.99 * bound < largest <= bound
    patches = float(model.pos_embed.proj.weight.detach().abs().max())
    assert 0.95 * (6 / (4 + 128)) ** 0.5 < patches <= (6 / (4 + 128)) ** 0.5


def test_the_stock_class_would_not_start_so() -> None:
    stock = load("diffusers:DiTTransformer2DModel", config=PRESETS["dit-tiny"].config).eval()
    assert called(stock, infer_example(stock)).any()
    # Seven more embedders of 256 d + d² + 2 d + 1001 d.
    more = 7 * (256 * 128 + 128**2 + 2 * 128 + 1001 * 128)
    assert count(stock) == PRESETS["dit-tiny"].parameters + more


def test_dit_embedders_are_one_in_every_block() -> None:
    model: Any = load("preset:dit-tiny", dtype="bfloat16")
    first = model.transformer_blocks[0].norm1.emb
    assert all(block.norm1.emb is first for block in model.transformer_blocks)
    assert sum(".emb." in name for name in model.state_dict()) == 8 * 5


def test_dit_embedders_stay_one_when_it_is_rebuilt_or_restored(
    recipes: Path, tmp_path: Path
) -> None:
    model = load("preset:dit-tiny", config={"num_layers": 3})
    description: Any = describe(model)
    again: Any = rebuild(description)
    assert again.transformer_blocks[2].norm1.emb is again.transformer_blocks[0].norm1.emb
    assert count(again) == count(model)
    # An adapter inside the shared embedder, which has a path in every block.
    surgery.apply(model, str(recipes / "lora-all-linear.yaml"))
    surgery.save(model, tmp_path / "adapted")
    restored = surgery.restore(tmp_path / "adapted")
    assert count(restored) == count(model)


def test_dit_with_embedders_apart_again_is_written_by_diffusers(tmp_path: Path) -> None:
    model: Any = load("preset:dit-tiny", config={"num_layers": 3}).eval()
    moved(model)
    expected = called(model, infer_example(model))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(called(load(tmp_path / "stock").eval(), infer_example(model)), expected)
    surgery.save(model, tmp_path / "ours")
    assert count(surgery.restore(tmp_path / "ours")) == count(model)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ({"transformer_blocks.1.nowhere": "transformer_blocks.0"}, "no attribute|nowhere"),
        ({"transformer_blocks.1": "pos_embed"}, "expected two modules of one class"),
        ([], "'shared' is"),
    ],
)
def test_a_description_that_shares_what_cannot_be(shared: Any, message: str) -> None:
    description = describe(load("preset:dit-tiny", device="meta"))
    assert description is not None
    assert set(description["shared"].values()) == {"transformer_blocks.0.norm1.emb"}
    with pytest.raises(SourceError, match=message):
        rebuild({**description, "shared": shared})


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
# What DPM-Solver of diffusers does with numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dit_works_in_the_pipeline(guidance: float, name: str) -> None:
    import diffusers

    model = load("preset:dit-tiny").eval()
    moved(model)
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        sample_size=8,
    )
    pipeline = diffusers.DiTPipeline(
        transformer=model, vae=vae, scheduler=getattr(diffusers, name)(num_train_timesteps=1000)
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [3, 9],
        guidance_scale=guidance,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()
    assert images.std() > 0
