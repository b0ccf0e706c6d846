"""From a decoded image to a sample: torchvision's transforms, and where their randomness is from.

What is random about a sample is drawn from the seed and the sample's position in the whole training
alone. Resuming a run, or giving it more ranks or workers, therefore changes no pixel.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from surgery.train.data.configs import Augment, Fit
from surgery.train.data.libraries import require

if TYPE_CHECKING:
    from PIL.Image import Image

_SPLIT_SEED = 0  # another number would put held-out samples of earlier runs into training
_IMAGENET_MARGIN = 256 / 224


@contextmanager
def drawn_from(seed: int, position: int, purpose: str) -> Generator[None]:
    """Let torch's default CPU generator be a function of the arguments inside the block.

    torchvision's transforms draw from that generator and take no other. Its state is put back
    afterwards; generators of accelerators are not touched.
    """
    default = torch.default_generator
    before = default.get_state()
    default.manual_seed(derive(seed, position, purpose))
    try:
        yield
    finally:
        default.set_state(before)


def derive(seed: int, position: int, purpose: str) -> int:
    """A seed for a generator, unrelated for any two sets of arguments."""
    text = struct.pack("<QQ", seed, position) + purpose.encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds below 2^63 everywhere


def split(labels: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Divide samples into a part to train on and a part to evaluate on, the same in every run.

    Args:
        labels: int64 (N,).
        held_out: Part of each class to evaluate on, rounded; of two samples or more of a class,
            at least one is in either part.

    Returns:
        Indices of both parts, int64, ascending.
    """
    draw = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(labels), generator=draw)
    # Stable: inside a class, the random order stays.
    order = order[torch.sort(labels[order], stable=True).indices]
    kept: list[Tensor] = []
    for group in torch.split(order, _counts(labels)):
        count = min(max(round(held_out * len(group)), 1), len(group) - 1)
        kept.append(group[:count])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(kept)] = True
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()


def _counts(labels: Tensor) -> list[int]:
    """How often each label occurs, from the smallest label that does."""
    _, counts = cast("tuple[Tensor, Tensor]", cast("Any", torch).unique(labels, return_counts=True))
    return [int(count) for count in counts]


@dataclass(frozen=True)
class Pipeline:
    """What is done to a decoded image.

    Attributes:
        steps: torchvision transforms, one after the other.
        random: Whether they draw at random.
    """

    steps: Sequence[Callable[[Any], Any]]
    random: bool

    def __call__(self, image: Image | Tensor, seed: int, position: int) -> Tensor:
        """The sample, float32 (C, H, W) in [-1, 1].

        Args:
            image: As ``images.decode`` returns it; or uint8 (C, H, W); or float32 (C, H, W) that
                is in [-1, 1] already.
            seed: Of the run.
            position: Of the sample in the whole training.
        """
        if not self.random:
            return to_sample(self._run(image))
        with drawn_from(seed, position, "augment"):
            return to_sample(self._run(image))

    def _run(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


def to_sample(image: Image | Tensor) -> Tensor:
    """An image with values from 0 to 255 as float32 (C, H, W) in [-1, 1]."""
    if not isinstance(image, Tensor):
        image = _transforms().functional.pil_to_tensor(image)
    pixels = cast("Tensor", image)
    if pixels.dtype == torch.float32:
        return pixels
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def training(
    shape: tuple[int, int] | None,
    fit: Fit | None,
    augment: Augment,
    *,
    black: float = 0.0,
) -> Pipeline:
    """What is done to training samples.

    Args:
        shape: Height and width of a sample.
        fit: How an image gets that shape; None if it has it.
        augment: What is done at random.
        black: The value that padding has.
    """
    v2 = _transforms()

    steps: list[Callable[[Any], Any]] = []
    if augment.resized_crop:
        steps.append(v2.RandomResizedCrop(_given(shape), antialias=True))
    elif fit is not None:
        steps += fitting(_given(shape)[0], fit)
    if augment.pad:
        steps.append(v2.RandomCrop(_given(shape), padding=augment.pad, fill=black))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    return Pipeline(steps, augment.resized_crop or augment.pad > 0 or augment.flip)


def evaluation(size: int | None, fit: Fit | None) -> Pipeline:
    """What is done to held-out samples: ``fit``, nothing random."""
    return Pipeline([] if fit is None or size is None else fitting(size, fit), random=False)


def fitting(size: int, fit: Fit) -> list[Callable[[Any], Any]]:
    """Transforms that make an image of any shape ``size`` by ``size``."""
    v2 = _transforms()

    if fit == "adm":
        return [functools.partial(adm_crop, size=size)]
    if fit == "imagenet":
        shorter = round(size * _IMAGENET_MARGIN)
        return [v2.Resize(shorter, antialias=True), v2.CenterCrop(size)]
    bicubic = v2.InterpolationMode.BICUBIC
    return [v2.Resize(size, bicubic, antialias=True), v2.CenterCrop(size)]


def adm_crop(image: Image, size: int) -> Image:
    """The centre crop that ADM (arXiv 2105.05233) and DiT (arXiv 2212.09748) train on.

    The image is halved with a box filter while its shorter side is at least twice ``size``, scaled
    by bicubic interpolation so that this side is ``size``, and cropped. Halving first makes it
    sharper than one resize.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    image = image.resize((wide, high), Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.crop((left, top, left + size, top + size))


def _transforms() -> Any:
    return require("torchvision.transforms.v2", "images are transformed by torchvision")


def _given(shape: tuple[int, int] | None) -> tuple[int, int]:
    if shape is None:
        raise ValueError("this transform needs the shape of a sample")
    return shape
