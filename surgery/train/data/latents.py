"""Latents of images, encoded once with a VAE (latent diffusion, arXiv 2112.10752).

What is cached are mean and log-variance of the encoder's distribution, not one draw from it: each
time a sample is seen, its latent is drawn anew as in DiT (arXiv 2212.09748), by seed and position.
"""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from surgery.errors import DataError
from surgery.train.data.base import Batch, Data, Facts, Samples
from surgery.train.data.configs import LatentData
from surgery.train.data.latent_cache import Index, Part, encode, load_vae
from surgery.train.data.libraries import require
from surgery.train.data.transforms import derive


class LatentSamples(Samples):
    """Latents with labels: {"images": float32 (C, h, w), "labels": int64 ()}.

    Args:
        cache: Folder of the cache.
        index: Its index.
        part: Which samples.
        draw: Whether latents are drawn from the encoder's distribution, or are its mean.
        seed: What is drawn from, beside the position of a sample.

    Raises:
        DataError: a file of the cache is missing or damaged.
    """

    def __init__(self, cache: Path, index: Index, part: Part, *, draw: bool, seed: int) -> None:
        self.cache = cache
        self.index = index
        self.part: Part = part
        self.draw = draw
        self.seed = seed
        self._shards = index.shards(part)
        self._starts = [start for _, start, _ in self._shards]
        self._opened: dict[int, Any] = {}
        self.labels = torch.cat([self._labels(number) for number in range(len(self._shards))])

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process.
        return self.__dict__ | {"_opened": {}}

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int, position: int) -> Batch:
        """One latent, scaled to unit variance as the VAE's configuration says."""
        generator = torch.Generator().manual_seed(derive(self.seed, position, "latent"))
        copies = self._moments(index)
        copy = int(torch.randint(len(copies), (), generator=generator))
        latent = _drawn(copies[copy], generator, self.draw)
        scaled = (latent - self.index.shift_factor) * self.index.scaling_factor
        return {"images": scaled, "labels": self.labels[index]}

    def _moments(self, index: int) -> Tensor:
        """All copies of one image's moments, float32 (copies, 2C, h, w)."""
        number = bisect.bisect_right(self._starts, index) - 1
        rows = self._open(number).get_slice("moments")
        return rows[index - self._starts[number]].to(torch.float32)

    def _labels(self, number: int) -> Tensor:
        name, start, stop = self._shards[number]
        file = self._open(number)
        expected = (stop - start, self.index.copies(self.part), *self.index.shape)
        found = tuple(file.get_slice("moments").get_shape())
        if found != expected:
            raise DataError(
                f"{self.cache / name} holds moments {found}, expected {expected}",
                hint="remove the file; it is made anew at the next start",
            )
        return file.get_tensor("labels")

    def _open(self, number: int) -> Any:
        """A file of the cache, mapped into memory."""
        if number in self._opened:
            return self._opened[number]
        from safetensors import SafetensorError, safe_open

        path = self.cache / self._shards[number][0]
        try:
            opened: Any = cast("Any", safe_open)(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{path} cannot be read: {error}",
                hint="remove the file; it is made anew at the next start",
            ) from None
        self._opened[number] = opened
        return opened


def open_latents(config: LatentData, *, seed: int) -> Data:
    """Latents of images; those that the cache lacks are encoded first.

    Args:
        config: The ``data`` section.
        seed: What latents and mirror images are drawn from.

    Raises:
        DataError: the images cannot be opened; the VAE does not take them; the cache is of others,
            damaged, or cannot be written.
        SourceError: the VAE cannot be loaded.
    """
    from surgery.train.data import open_data

    images = open_data(config.images, seed=seed)
    index = encode(config, images, load_vae(config.vae, config.device))
    cache = Path(config.cache).expanduser()
    draw = config.posterior == "sample"
    moments, height, width = index.shape
    return Data(
        train=LatentSamples(cache, index, "train", draw=draw, seed=seed),
        held_out=LatentSamples(cache, index, "held_out", draw=draw, seed=seed),
        facts=Facts(
            kind=config.kind,
            channels=moments // 2,
            size=(height, width),
            classes=images.facts.classes,
            names=images.facts.names,
        ),
    )


def _drawn(moments: Tensor, generator: torch.Generator, draw: bool) -> Tensor:
    """A latent (C, h, w) from moments (2C, h, w)."""
    vae = require("diffusers.models.autoencoders.vae", "latents are drawn by diffusers")
    distribution = vae.DiagonalGaussianDistribution(moments.unsqueeze(0))
    latent = distribution.sample(generator=generator) if draw else distribution.mode()
    return cast("Tensor", latent)[0]
