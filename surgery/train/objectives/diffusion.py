"""Denoising as in DiT (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from surgery.errors import CheckpointError, TrainingError
from surgery.train.ema import Ema
from surgery.train.objectives import denoiser, gaussian, images, noise
from surgery.train.objectives.base import (
    POSITION,
    Batch,
    Gather,
    Objective,
    alone,
    evaluating,
    measured,
)
from surgery.train.objectives.configs import DiffusionObjective, ImageSampling

if TYPE_CHECKING:
    from surgery.train.data.base import Facts


class Diffusion(Objective):
    """Predicts the noise, or the velocity, of samples noised to a random level.

    The loss is the mean squared error. A model with twice the data's channels learns the variance
    of the reverse step too: a term of the variational bound is added, in which the prediction is
    held fixed (arXiv 2102.09672, L_hybrid).

    Args:
        config: Section ``objective``.
        facts: What the data is.
        model: The plain model, which is tried on two empty samples. Label dropout of diffusers in
            it is switched off, in favour of this objective's own.
        seed: Seed of timesteps, dropped labels and noise.
        vae: The VAE that made latents, as a ``surgery.load`` spec; None for pixels.

    Raises:
        ModelStateError: the model does not fit the data.
        TrainingError: the data does not fit the objective.
        SourceError: images should be drawn, and the VAE cannot be loaded.
    """

    def __init__(
        self,
        config: DiffusionObjective,
        facts: Facts,
        model: nn.Module,
        *,
        seed: int,
        vae: str | None = None,
    ) -> None:
        self.config = config
        self.facts = facts
        self.sample_every = None if config.sample is None else config.sample.every
        self.denoiser = denoiser.fit(model, facts, nullable=config.label_dropout > 0)
        self._seed = seed
        self._process = gaussian.Diffusion(config.steps, config.prediction)
        self._ema: Ema | None = None
        self._decoder: images.Decoder | None = None
        if config.sample is not None:
            self._check_guidance(config.sample)
            # Loaded now, so that a run does not fail at its first grid.
            self._decoder = None if vae is None else images.Decoder.load(vae)

    def loss(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Mean over ``images`` (B, C, H, W) in [-1, 1], or latents, with ``labels`` (B,)."""
        drawn = noise.for_training(
            self._seed,
            step,
            _positions(batch),
            batch["images"],
            levels=self.config.steps,
            dropout=self.config.label_dropout,
        )
        error, bound = self._terms(model, batch, drawn)
        if bound is None:
            return error.mean()
        # The whole bound has a term per level, and a weight of 1/1000 (arXiv 2102.09672).
        return (error + bound * (self.config.steps / 1000)).mean()

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], *, gather: Gather = alone
    ) -> dict[str, float]:
        """Mean squared error at levels and noise that are the same in every evaluation.

        Args:
            model: As for ``loss``.
            batches: All held-out samples of this rank; gone through twice if there is an average.
            gather: Joins the values of all ranks.

        Returns:
            ``loss``; ``bound``, a term of the variational bound in bits per dimension, where the
            model learns a variance; and both with the averaged weights, if an average is kept, as
            ``loss_ema`` and ``bound_ema``.
        """
        found = self._measure(model, batches, gather)
        if self._ema is None:
            return found
        with self._ema.applied():
            averaged = self._measure(model, batches, gather)
        return found | {f"{name}_ema": value for name, value in averaged.items()}

    def sample(self, model: nn.Module, out: Path | None, step: int) -> Path | None:
        """Draw a grid, ``step-000100.png``, with the weights that the model has now."""
        if self.config.sample is None:
            return None
        drawn = self.draw(model)
        return None if out is None else self.write(drawn, out / f"step-{step:06d}.png")

    def draw(self, model: nn.Module) -> Tensor:
        """Images float32 (N, C, H, W) in [0, 1], their classes going round."""
        sampling, size = self.config.sample, self.facts.size
        if sampling is None or size is None:
            raise TrainingError("the configuration has no objective.sample to draw images by")
        return images.draw(
            model,
            self.denoiser,
            self.config,
            sampling,
            size=size,
            labels=[index % (self.facts.classes or 1) for index in range(sampling.count)],
            decoder=self._decoder,
        )

    def write(self, drawn: Tensor, path: Path) -> Path:
        """Write images to a file, as a grid."""
        return images.write(drawn, path)

    def start(self, model: nn.Module) -> None:
        """Begin the average at the weights the model has now."""
        if self.config.ema is not None:
            self._ema = Ema(model, self.config.ema)

    def stepped(self) -> None:
        """Take the weights into the average."""
        if self._ema is not None:
            self._ema.update()

    def averaged(self) -> AbstractContextManager[None]:
        """While it is open, the model has the averaged weights, if an average is kept."""
        return nullcontext() if self._ema is None else self._ema.applied()

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {} if self._ema is None else {"ema": self._ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average.

        Raises:
            CheckpointError: the checkpoint has an average and this objective none, or the other
                way round; or it is of another model.
        """
        if ("ema" in state) != (self._ema is not None):
            there, here = ("an", "no") if "ema" in state else ("no", "an")
            raise CheckpointError(
                f"the checkpoint holds {there} average of weights, and this run keeps {here} one",
                hint="resume with the configuration that the run was started with",
            )
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])

    def _terms(
        self, model: nn.Module, batch: Batch, drawn: noise.Drawn
    ) -> tuple[Tensor, Tensor | None]:
        """Squared error and bound of each sample: (B,) each; no bound without a variance."""
        clean, t = batch["images"].float(), drawn.timesteps
        noised = self._process.noised(clean, drawn.noise, t)
        predicted, variance = self.denoiser(model, noised, t, self._labels(batch, drawn))
        error = gaussian.squared_error(predicted, self._process.target(clean, drawn.noise, t))
        if variance is None:
            return error, None
        # The bound teaches the variance only; what is predicted learns from the squared error.
        return error, self._process.bound(clean, noised, predicted.detach(), variance, t)

    def _labels(self, batch: Batch, drawn: noise.Drawn) -> Tensor | None:
        if not self.denoiser.labelled:
            return None
        if self.denoiser.null is None:
            return batch["labels"]
        return torch.where(drawn.dropped, self.denoiser.null, batch["labels"])

    def _measure(
        self, model: nn.Module, batches: Iterable[Batch], gather: Gather
    ) -> dict[str, float]:
        with evaluating(model):
            total = measured(batches, partial(self._per_sample, model), gather)
        means = [value / total[-1] for value in total[:-1]]
        return dict(zip(("loss", "bound"), means, strict=False))

    def _per_sample(self, model: nn.Module, batch: Batch) -> Tensor:
        """Squared error, and bound if there is one, of each sample: (B, 1) or (B, 2)."""
        drawn = noise.for_evaluation(_positions(batch), batch["images"], levels=self.config.steps)
        terms = self._terms(model, batch, drawn)
        return torch.stack([term for term in terms if term is not None], dim=1)

    def _check_guidance(self, config: ImageSampling) -> None:
        if config.guidance > 1 and self.denoiser.null is None:
            raise TrainingError(
                f"guidance {config.guidance} needs a model with a null class, and this one has "
                "none",
                hint="set objective.sample.guidance: 1.0",
            )


def _positions(batch: Batch) -> list[int]:
    if POSITION not in batch:
        raise TrainingError(
            f"the batch has {', '.join(sorted(batch))} and no {POSITION!r}, which noise is drawn "
            "from",
            hint="use the loaders of surgery.train.data",
        )
    return cast("list[int]", cast("Any", batch[POSITION]).tolist())
