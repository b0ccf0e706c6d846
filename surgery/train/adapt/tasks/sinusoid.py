"""Sine waves: the standard problem of fast adaptation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from surgery.train.adapt.tasks.configs import SinusoidTasks
from surgery.train.adapt.tasks.episodes import EPOCH, HELD_OUT_SEED, QUERY, SUPPORT
from surgery.train.data.base import Batch, Data, Facts, Samples


class Sinusoids(Samples):
    """Tasks ``y = a sin(x - p)``, each a function of the seed and its number.

    A batch of B tasks has ``support.inputs`` and ``support.targets``, float32 (B, shots, 1), and
    the same of ``query.``.

    Args:
        config: The ``data`` section.
        part: Sets tasks of one seed apart.
        seed: What tasks are drawn from.
    """

    def __init__(self, config: SinusoidTasks, part: int, seed: int) -> None:
        self.config = config
        self.part = part
        self.seed = seed

    def __len__(self) -> int:
        return EPOCH

    def sample(self, index: int, position: int) -> Batch:
        """One task."""
        config = self.config
        draw = np.random.default_rng([self.seed, self.part, position])
        amplitude, phase = draw.uniform(*config.amplitude), draw.uniform(*config.phase)
        x = torch.from_numpy(  # pyright: ignore[reportUnknownMemberType]
            draw.uniform(*config.inputs, size=(config.shots + config.queries, 1))
        )
        y = amplitude * torch.sin(x - phase)
        return {
            f"{part}{name}": chosen
            for name, values in (("inputs", x), ("targets", y))
            for part, chosen in zip((SUPPORT, QUERY), self._parted(values), strict=True)
        }

    def _parted(self, values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.float()
        return values[: self.config.shots], values[self.config.shots :]


def open_sinusoid(config: SinusoidTasks, *, seed: int) -> Data:
    """Sine waves to train on, and others to evaluate on.

    Args:
        config: The ``data`` section.
        seed: What the tasks of the training are drawn from.
    """
    return Data(
        Sinusoids(config, 0, seed), Sinusoids(config, 1, HELD_OUT_SEED), Facts(kind=config.kind)
    )
