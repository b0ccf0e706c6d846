"""Images drawn from a denoiser with diffusers' schedulers, and grids of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import ModelStateError
from surgery.sources.libraries import require
from surgery.train.objectives import gaussian, noise
from surgery.train.objectives.base import evaluating, placement
from surgery.train.objectives.configs import DiffusionObjective, ImageSampling

if TYPE_CHECKING:
    from surgery.train.objectives.denoiser import Denoiser

# Images drawn at a time; guidance doubles them.
_AT_ONCE = 64
_DECODED_AT_ONCE = 8
# Small images are enlarged to about this many pixels, so that a grid can be looked at.
_SIDE = 64


@dataclass(frozen=True)
class Decoder:
    """Latents to images.

    Attributes:
        vae: An ``AutoencoderKL`` of diffusers.
    """

    vae: nn.Module

    @classmethod
    def load(cls, spec: str) -> Decoder:
        """Load the VAE that made the latents.

        Raises:
            SourceError: it cannot be loaded.
            ModelStateError: it is no ``AutoencoderKL``.
        """
        from surgery.sources import load

        vae = load(spec, pretrained=True).eval().requires_grad_(requires_grad=False)
        if not isinstance(vae, require("diffusers").AutoencoderKL):
            raise ModelStateError(
                f"{spec} is {type(vae).__name__}, expected an AutoencoderKL of diffusers",
                hint="name the VAE that the latents were made with in data.vae",
            )
        return cls(vae)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1] from scaled latents."""
        vae: Any = self.vae.to(latents.device)
        shift = vae.config.shift_factor or 0.0
        unscaled = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        # A few at a time: activations at full resolution are far larger than the latents.
        return torch.cat([vae.decode(part).sample for part in unscaled.split(_DECODED_AT_ONCE)])


def draw(
    model: nn.Module,
    denoiser: Denoiser,
    objective: DiffusionObjective,
    config: ImageSampling,
    *,
    size: tuple[int, int],
    labels: Sequence[int],
    decoder: Decoder | None = None,
) -> Tensor:
    """Draw one image for each label. The global random state is left as it was.

    Args:
        model: The plain model.
        denoiser: How it is called.
        objective: What it was trained on.
        config: Sampler, steps, guidance, seed.
        size: Height and width of a sample.
        labels: Classes, one per image; a model without labels disregards them.
        decoder: For a model of latents.

    Returns:
        float32 (N, C, H, W) in [0, 1], on the CPU.
    """
    device, _ = placement(model)
    drawn: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(labels), _AT_ONCE):
            part = labels[start : start + _AT_ONCE]
            sources = [noise.generator(config.seed, start + row) for row in range(len(part))]
            run = _Reverse(model, denoiser, objective, config, pixels=decoder is None)
            shape = (denoiser.channels, *size)
            # Noise comes from the CPU, so that an image is the same on every device.
            first = torch.stack([torch.randn(shape, generator=each) for each in sources])
            sample = run(first.to(device), torch.tensor(part, device=device), sources)
            drawn.append((sample if decoder is None else decoder(sample)).float().cpu())
    return (torch.cat(drawn) / 2 + 0.5).clamp(0, 1)


def write(images: Tensor, path: Path) -> Path:
    """Write images (N, C, H, W) in [0, 1] as a grid; small ones enlarged, pixel by pixel."""
    utils: Any = importlib.import_module("torchvision.utils")

    factor = max(1, _SIDE // max(images.shape[-2:]))
    large = images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    grid = utils.make_grid(large, nrow=_columns(len(images)), pad_value=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    utils.save_image(grid, path)
    return path


def _columns(count: int) -> int:
    """Ten to a row where that comes out even, as digits do; else a square."""
    return 10 if count % 10 == 0 else math.ceil(math.sqrt(count))


class _Reverse:
    """The reverse process, from noise to samples."""

    def __init__(
        self,
        model: nn.Module,
        denoiser: Denoiser,
        objective: DiffusionObjective,
        config: ImageSampling,
        *,
        pixels: bool,
    ) -> None:
        self._model = model
        self._denoiser = denoiser
        self._guidance = config.guidance
        self._null = denoiser.null
        # Only the ancestral sampler draws with the learned variance.
        self._variance = denoiser.learns_variance and config.scheduler == "ddpm"
        self._scheduler = _scheduler(objective, config, learned=self._variance, pixels=pixels)

    def __call__(self, sample: Tensor, labels: Tensor, sources: list[torch.Generator]) -> Tensor:
        drawing: dict[str, Any] = {"generator": sources}
        for t in self._scheduler.timesteps:
            output = self._output(self._scheduler.scale_model_input(sample, t), int(t), labels)
            sample = self._scheduler.step(output, t, sample, **drawing).prev_sample
        return sample

    def _output(self, sample: Tensor, timestep: int, labels: Tensor) -> Tensor:
        predicted, variance = self._called(sample, timestep, labels)
        return torch.cat([predicted, variance], dim=1) if variance is not None else predicted

    def _called(
        self, sample: Tensor, timestep: int, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if self._guidance == 1 or self._null is None:
            predicted, variance = self._denoiser(
                self._model, sample, labels.new_full((len(sample),), timestep), labels
            )
            return predicted, variance if self._variance else None
        null = torch.full_like(labels, self._null)
        predicted, variance = self._denoiser(
            self._model,
            torch.cat([sample, sample]),
            labels.new_full((2 * len(sample),), timestep),
            torch.cat([labels, null]),
        )
        with_label, without = predicted.chunk(2)
        guided = without + self._guidance * (with_label - without)
        return guided, variance.chunk(2)[0] if variance is not None and self._variance else None


def _scheduler(
    objective: DiffusionObjective, config: ImageSampling, *, learned: bool, pixels: bool
) -> Any:
    diffusers = require("diffusers")
    common = gaussian.schedule(objective.steps, objective.prediction)
    # Both spacings begin at the last level, which is noise (arXiv 2305.08891). The ancestral
    # sampler ends at level 0 too, the only step at which it adds no noise (arXiv 2102.09672).
    if config.scheduler == "ddpm":
        made = diffusers.DDPMScheduler(
            **common,
            timestep_spacing="linspace",
            clip_sample=pixels,
            variance_type="learned_range" if learned else "fixed_small",
        )
    elif config.scheduler == "ddim":
        made = diffusers.DDIMScheduler(**common, timestep_spacing="trailing", clip_sample=pixels)
    else:
        made = diffusers.DPMSolverMultistepScheduler(**common, timestep_spacing="trailing")
    made.set_timesteps(config.steps)
    return made
