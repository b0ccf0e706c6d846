"""The Gaussian diffusion that a denoiser is trained on (DDPM, arXiv 2006.11239).

Noise is added and velocities are made by diffusers' scheduler. What no scheduler has is the
variational bound of a learned variance (improved DDPM, arXiv 2102.09672).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.sources.libraries import require

Prediction = Literal["epsilon", "v"]

# Pixels have 8 bits, spread over [-1, 1]: half the distance of two values.
_HALF_BIN = 1 / 255
_LOG_FLOOR = 1e-12


def schedule(levels: int, prediction: Prediction) -> dict[str, Any]:
    """Arguments that every scheduler of the diffusion has in common.

    Betas are linear, from 1e-4 to 0.02 at 1000 levels, and scaled to end in noise at any other
    number of levels (arXiv 2102.09672).
    """
    return {
        "num_train_timesteps": levels,
        "beta_schedule": "linear",
        "beta_start": 0.1 / levels,
        "beta_end": 20 / levels,
        "prediction_type": "epsilon" if prediction == "epsilon" else "v_prediction",
    }


class Diffusion:
    """Forward process and the bounds on its reverse.

    Tensors of samples are float32 (B, ...); timesteps are int64 (B,), 0 the least noisy.

    Args:
        levels: Noise levels.
        prediction: What the model predicts: the noise, or the velocity (arXiv 2202.00512).
    """

    def __init__(self, levels: int, prediction: Prediction) -> None:
        self.levels = levels
        self.prediction = prediction
        self._scheduler = require("diffusers").DDPMScheduler(**schedule(levels, prediction))
        # float64 until the end: 1 - alpha_bar has lost half its digits in float32 at small t.
        betas = self._scheduler.betas.double()
        bars = (1 - betas).cumprod(0)
        before = torch.cat([bars.new_ones(1), bars[:-1]])
        variance = betas * (1 - before) / (1 - bars)
        # The posterior at t = 0 has no variance; the next one stands in for it.
        log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        weight_of_clean = betas * before.sqrt() / (1 - bars)
        self._tables: dict[str, Tensor] = {
            "signal": bars.sqrt(),
            "noise": (1 - bars).sqrt(),
            "log_beta": betas.log(),
            "log_variance": log_variance,
            "weight_of_clean": weight_of_clean,
        }

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples with noise of their levels: sqrt(a) x + sqrt(1 - a) e."""
        return self._scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: e, or sqrt(a) e - sqrt(1 - a) x."""
        if self.prediction == "epsilon":
            return noise
        return self._scheduler.get_velocity(clean, noise, timesteps)

    def bound(
        self, clean: Tensor, noised: Tensor, predicted: Tensor, variance: Tensor, timesteps: Tensor
    ) -> Tensor:
        """One term of the variational bound, in bits per dimension: (B,).

        At t > 0 the divergence of the learned reverse step from the true posterior, at t = 0 minus
        the log-likelihood of 8-bit pixels.

        Args:
            clean: The samples.
            noised: With noise.
            predicted: Noise or velocity as predicted.
            variance: Where the log-variance lies between that of the posterior (-1) and beta (1).
            timesteps: Their levels.
        """
        at = {name: self._at(name, timesteps, clean) for name in self._tables}
        if self.prediction == "epsilon":
            guess = (noised - at["noise"] * predicted) / at["signal"]
        else:
            guess = at["signal"] * noised - at["noise"] * predicted
        share = (variance + 1) / 2
        log_variance = share * at["log_beta"] + (1 - share) * at["log_variance"]
        # Both means have the noised sample in them, with one weight: it is not in the difference.
        off = at["weight_of_clean"] * (clean - guess)
        divergence = _divergence(off, at["log_variance"], log_variance)
        # At t = 0 the mean of the reverse step is the guess itself.
        likelihood = _log_likelihood(clean, guess, 0.5 * log_variance)
        first = timesteps.reshape(at["signal"].shape) == 0
        nats = torch.where(first, -likelihood, divergence)
        return nats.flatten(1).mean(1) / math.log(2)

    def _at(self, name: str, timesteps: Tensor, like: Tensor) -> Tensor:
        """A table's values at the timesteps, to be broadcast over samples."""
        table = self._tables[name]
        if table.device != timesteps.device:
            # MPS has no float64.
            table = self._tables[name] = table.float().to(timesteps.device)
        return table[timesteps].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _divergence(off: Tensor, log_true: Tensor, log_learned: Tensor) -> Tensor:
    """KL(N(m, exp(log_true)) || N(m + off, exp(log_learned))), elementwise, in nats."""
    ratio = log_true - log_learned
    return 0.5 * (ratio.exp() - 1 - ratio + off.square() * (-log_learned).exp())


def _log_likelihood(pixels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of 8-bit pixels in [-1, 1] under a Gaussian cut into bins, elementwise."""
    special: Any = torch.special
    scale = log_scale.exp()
    upper, lower = ((pixels - mean + edge) / scale for edge in (_HALF_BIN, -_HALF_BIN))
    above: Tensor = special.log_ndtr(upper)
    below: Tensor = special.log_ndtr(-lower)
    inside: Tensor = special.ndtr(upper) - special.ndtr(lower)
    # The outermost bins reach to infinity.
    inner = torch.where(pixels > 0.999, below, inside.clamp(min=_LOG_FLOOR).log())
    return torch.where(pixels < -0.999, above, inner)


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: (B,)."""
    return F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)
