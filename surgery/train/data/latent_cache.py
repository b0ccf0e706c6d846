"""Latents on disk: what the encoder says about every image, written once.

    CACHE/index.json               what the latents were made of, and how many each file holds
    CACHE/train-00000.safetensors  moments (n, copies, 2C, h, w), labels int64 (n,)
    CACHE/held_out-00000.safetensors

The index is written first. A file is written beside its place and renamed, so that it is there
whole or not at all; whoever starts next goes on with the first one that is not there. A lock lets
the ranks of a run come one after the other: the first encodes, the others find the work done.

The moments are mean and log-variance of the encoder's Gaussian before any scaling, as diffusers'
``DiagonalGaussianDistribution`` takes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from surgery import files, progress
from surgery.errors import DataError
from surgery.train.data.base import Data, Place, need
from surgery.train.data.configs import LatentData
from surgery.train.data.libraries import require
from surgery.train.data.stored import ImageSamples
from surgery.untrusted.documents import read_object

logger = logging.getLogger(__name__)

Part = Literal["train", "held_out"]

_FORMAT = 1
_INDEX = "index.json"
_SHARD_BYTES = 64 << 20
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# What of the section of the images changes neither their pixels nor their order beyond what the
# identity of the samples says.
_NOT_PIXELS = {"path", "held_out", "augment", "check", "index"}


@dataclass(frozen=True)
class Index:
    """What a cache was made of. Any difference makes it another cache.

    Attributes:
        format: Version of this layout.
        vae: Hash of the VAE's configuration and weights.
        scaling_factor: Of the VAE's configuration: latents are multiplied with it.
        shift_factor: Of the VAE's configuration: it is subtracted before.
        train: Identity of the images to train on.
        held_out: Identity of those to evaluate on.
        pixels: How images became samples.
        flip: Whether the second copy of a training image is its mirror image.
        dtype: Of the moments.
        shape: 2C, h and w of the moments of one image.
        counts: Images of both parts.
        shard: Images in a file; the last one of a part may hold fewer.
    """

    format: int
    vae: str
    scaling_factor: float
    shift_factor: float
    train: str
    held_out: str
    pixels: str
    flip: bool
    dtype: str
    shape: tuple[int, int, int]
    counts: tuple[int, int]
    shard: int

    def count(self, part: Part) -> int:
        """Images of a part."""
        return self.counts[0 if part == "train" else 1]

    def copies(self, part: Part) -> int:
        """How often each image is encoded."""
        return 2 if self.flip and part == "train" else 1

    def shards(self, part: Part) -> list[tuple[str, int, int]]:
        """Files of a part: name, first image, and the one after the last."""
        count = self.count(part)
        return [
            (f"{part}-{number:05d}.safetensors", start, min(start + self.shard, count))
            for number, start in enumerate(range(0, count, self.shard))
        ]


def load_vae(spec: str, device: str) -> nn.Module:
    """The VAE in float32 and eval mode.

    Raises:
        DataError: the spec has no weights, or is of another class.
        SourceError: it cannot be loaded.
    """
    from surgery.sources import load
    from surgery.sources.spec import parse

    scheme = parse(spec).scheme
    if scheme not in ("hub", "folder"):
        raise DataError(
            f"data.vae {spec!r} has random weights; latents need a trained VAE",
            hint="expected hub:ORG/NAME, such as hub:stabilityai/sd-vae-ft-ema, or a folder",
        )
    vae = load(spec, device=device, dtype="float32")
    expected = require("diffusers", "latents are encoded by diffusers").AutoencoderKL
    if not isinstance(vae, expected):
        raise DataError(
            f"data.vae {spec!r} is a {type(vae).__name__}, expected diffusers' AutoencoderKL"
        )
    if vae_config(vae).get("latents_mean") is not None:
        raise DataError(
            f"data.vae {spec!r} normalises each channel of its latents (latents_mean), which is "
            "not supported",
            hint="use a VAE with a scaling_factor only",
        )
    return vae.eval().requires_grad_(requires_grad=False)


def vae_config(vae: nn.Module) -> Mapping[str, Any]:
    """The configuration of a VAE."""
    found: Any = vae.config
    return found


def scaling(vae: nn.Module) -> tuple[float, float]:
    """Factor and shift of a VAE: latents are (z - shift) × factor."""
    config = vae_config(vae)
    return float(config["scaling_factor"]), float(config["shift_factor"] or 0.0)


def fingerprint(vae: nn.Module) -> str:
    """A hash of what a VAE computes: its configuration and all its weights."""
    config = {key: value for key, value in vae_config(vae).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy())
    return digest.hexdigest()


def encode(config: LatentData, data: Data, vae: nn.Module) -> Index:
    """Complete the cache: encode what it does not hold yet.

    Args:
        config: The ``data`` section.
        data: The images, whose parts are ``ImageSamples``.
        vae: As ``load_vae`` returns it.

    Returns:
        The index of the complete cache.

    Raises:
        DataError: the cache is of other images or another VAE, or cannot be written; the VAE does
            not take the images, or gives latents that are not finite.
    """
    cache = Path(config.cache).expanduser()
    parts = _plain_parts(data)
    wanted = _wanted(config, data, parts, vae)
    with _alone(cache):
        _agree(cache, wanted)
        _complete(cache, wanted, parts, vae, batch=config.batch)
    return wanted


def _complete(
    cache: Path, index: Index, parts: Mapping[Part, ImageSamples], vae: nn.Module, *, batch: int
) -> None:
    missing: list[tuple[Part, tuple[str, int, int]]] = [
        (part, shard)
        for part in parts
        for shard in index.shards(part)
        if not (cache / shard[0]).exists()
    ]
    total = sum(stop - start for _, (_, start, stop) in missing)
    with progress.task("encoding images", total) as task:
        for part, (name, start, stop) in missing:
            moments: list[Tensor] = []
            for first in range(start, stop, batch):
                chosen = range(first, min(first + batch, stop))
                images = parts[part].batch([Place(each, each) for each in chosen])["images"]
                moments.append(_moments(vae, images, index, index.copies(part)))
                task.advance(len(chosen))
            labels = parts[part].labels[start:stop]
            _write(cache / name, {"moments": torch.cat(moments), "labels": labels.clone()})


def _moments(vae: nn.Module, images: Tensor, index: Index, copies: int) -> Tensor:
    """Moments (n, copies, 2C, h, w) of images (n, C, H, W)."""
    views = torch.stack([images, images.flip(-1)][:copies], dim=1).flatten(0, 1)
    encoded = _encoded(vae, views)
    found = encoded.to("cpu", _DTYPES[index.dtype]).reshape(-1, copies, *index.shape)
    need(
        bool(torch.isfinite(found).all()),
        f"the VAE gives latents that are not finite in {index.dtype}",
        hint="use data.dtype: float32; if that is what it was, the VAE is damaged",
    )
    return found


@torch.no_grad()
def _encoded(vae: nn.Module, images: Tensor) -> Tensor:
    device = next(vae.parameters()).device
    return cast("Any", vae).encode(images.to(device)).latent_dist.parameters


def _plain_parts(data: Data) -> dict[Part, ImageSamples]:
    """Both parts without augmentation: in the way held-out images are made."""
    train, held_out = data.train, data.held_out
    assert isinstance(train, ImageSamples), type(train)  # noqa: S101  # the configuration's union
    assert isinstance(held_out, ImageSamples), type(held_out)  # noqa: S101  # the same
    everything = torch.arange(len(train))
    return {"train": train.take(everything, held_out.pipeline), "held_out": held_out}


def _wanted(
    config: LatentData, data: Data, parts: Mapping[Part, ImageSamples], vae: nn.Module
) -> Index:
    _check_fit(config, data, vae)
    shape = _shape(data, vae)
    copies = 2 if config.images.augment.flip else 1
    width = math.prod(shape) * copies * _DTYPES[config.dtype].itemsize
    factor, shift = scaling(vae)
    pixels = config.images.model_dump(mode="json", exclude=_NOT_PIXELS)
    return Index(
        format=_FORMAT,
        vae=fingerprint(vae),
        scaling_factor=factor,
        shift_factor=shift,
        train=parts["train"].identity(),
        held_out=parts["held_out"].identity(),
        pixels=json.dumps(pixels, sort_keys=True),
        flip=config.images.augment.flip,
        dtype=config.dtype,
        shape=shape,
        counts=(len(parts["train"]), len(parts["held_out"])),
        shard=max(1, _SHARD_BYTES // width),
    )


def _shape(data: Data, vae: nn.Module) -> tuple[int, int, int]:
    """Shape of the moments of one image."""
    height, width = data.facts.size or (0, 0)
    factor = _factor(vae)
    return 2 * int(vae_config(vae)["latent_channels"]), height // factor, width // factor


def _factor(vae: nn.Module) -> int:
    """How many times smaller than an image its latent is: every block but the last halves it."""
    return 2 ** (len(vae_config(vae)["block_out_channels"]) - 1)


def _check_fit(config: LatentData, data: Data, vae: nn.Module) -> None:
    sizes = vae_config(vae)
    channels, (height, width) = data.facts.channels, data.facts.size or (0, 0)
    need(
        channels == sizes["in_channels"],
        f"the images have {channels} channels, and data.vae {config.vae!r} takes "
        f"{sizes['in_channels']}",
        hint=f"set data.images.channels: {sizes['in_channels']}",
    )
    factor = _factor(vae)
    need(
        height % factor == 0 and width % factor == 0,
        f"images of {height} by {width} pixels do not divide by {factor}, the factor by which "
        f"data.vae {config.vae!r} shrinks them",
        hint=f"set data.images.size to a multiple of {factor}",
    )


# --- files ------------------------------------------------------------------------------------


@contextmanager
def _alone(cache: Path) -> Generator[None]:
    """Hold the cache's lock, and clear away what a killed process left half written."""
    from filelock import FileLock, Timeout

    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache {str(cache)!r} cannot be made: {error.strerror}") from None
    lock = FileLock(cache / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("%s: waiting for another process that encodes images", cache)
        lock.acquire()
    try:
        for left in cache.glob(".*.writing"):
            left.unlink()
        yield
    finally:
        lock.release()


def _agree(cache: Path, wanted: Index) -> None:
    """Write the index of a new cache, or compare it with that of one that is there."""
    path = cache / _INDEX
    mine = json.loads(json.dumps(asdict(wanted)))
    if not path.exists():
        strangers = sorted(each.name for each in cache.iterdir() if not each.name.startswith("."))
        if strangers:
            raise DataError(
                f"data.cache {str(cache)!r} holds {strangers[0]} and no {_INDEX}: it is no cache",
                hint="name an empty or new folder",
            )
        _write_bytes(path, json.dumps(mine, indent=2).encode())
        return
    found = read_object(path, error=DataError)
    if found == mine:
        return
    listed = "; ".join(
        f"{_WORDS.get(key, key)} ({_short(found.get(key))}, now {_short(value)})"
        for key, value in mine.items()
        if found.get(key) != value
    )
    raise DataError(
        f"the latents in data.cache {str(cache)!r} were made of something else: {listed}",
        hint="name another data.cache, or remove that folder to have it made anew",
    )


_WORDS = {
    "vae": "the VAE",
    "train": "the images to train on",
    "held_out": "the images held out",
    "pixels": "how images are prepared",
}


def _short(value: object) -> str:
    text = str(value)
    # Of a hash, the beginning tells enough.
    return text[:12] if len(text) == 64 else text


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    _write_bytes(path, save(tensors))


def _write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    try:
        files.write(path, data)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({len(data)} bytes): {error.strerror}",
            hint="the files before it are complete; the next start goes on from there",
        ) from None
