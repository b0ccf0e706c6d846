"""Randomness that belongs to a sample: a function of a seed, the step and the sample's position.

Nothing of it is kept between steps, so that there is nothing to save: a resumed run, or one on
another number of ranks, meets the same timesteps, dropped labels and noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 2**64
#: The fractional part of the golden ratio: its multiples fill [0, 1) more evenly than any other's.
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Drawn:
    """What is random about a batch.

    Attributes:
        timesteps: int64 (B,), from 0 to levels - 1.
        dropped: bool (B,): whose label is dropped.
        noise: Standard normal (B, ...), float32.
    """

    timesteps: Tensor
    dropped: Tensor
    noise: Tensor


def for_training(
    seed: int, step: int, positions: Sequence[int], like: Tensor, *, levels: int, dropout: float
) -> Drawn:
    """Draw for samples of a training step.

    Args:
        seed: Of the run.
        step: The optimizer step.
        positions: Places of the samples in the run's order.
        like: The samples (B, ...): shape and device of the noise.
        levels: Timesteps are below it, uniformly.
        dropout: How often a label is dropped.
    """
    words = [_words("train", seed, step, position) for position in positions]
    return Drawn(
        torch.tensor([word[0] % levels for word in words], device=like.device),
        torch.tensor([word[1] < dropout * _WORD for word in words], device=like.device),
        _normal([word[2] for word in words], like),
    )


def for_evaluation(positions: Sequence[int], like: Tensor, *, levels: int) -> Drawn:
    """Draw for held-out samples: the same in every evaluation of every run.

    Two evaluations, or two runs, then differ by their models alone. Timesteps are spread evenly,
    for less variance than independent ones have. No label is dropped.
    """
    words = [_words("held out", 0, 0, position) for position in positions]
    return Drawn(
        torch.tensor(
            [int((i + 0.5) * _GOLDEN % 1 * levels) for i in positions], device=like.device
        ),
        torch.zeros(len(positions), dtype=torch.bool, device=like.device),
        _normal([word[2] for word in words], like),
    )


def generator(seed: int, index: int) -> torch.Generator:
    """A generator on the CPU for image ``index`` of a grid, whatever the size of the grid."""
    return torch.Generator().manual_seed(_words("sample", seed, 0, index)[2])


def _words(purpose: str, seed: int, step: int, position: int) -> tuple[int, int, int]:
    """Three independent numbers below 2**64: a hash makes them, so that near keys are unrelated."""
    key = f"{purpose} {seed} {step} {position}".encode()
    digest = hashlib.blake2b(key, digest_size=24).digest()
    first, second, third = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16))
    return first, second, third


def _normal(seeds: Sequence[int], like: Tensor) -> Tensor:
    """Noise of each sample from its own seed, drawn on the device it is needed on."""
    noise = torch.empty(like.shape, device=like.device)
    source = torch.Generator(like.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=source.manual_seed(seed))
    return noise
