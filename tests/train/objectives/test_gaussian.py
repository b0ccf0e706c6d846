"""Noised inputs and targets against diffusers; the bound against a float64 reference by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from surgery.train.objectives import gaussian

LEVELS = 1000
TIMESTEPS = torch.tensor([0, 1, 2, 10, 250, 500, 900, 999])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(TIMESTEPS), 2, 3, 3)
    return torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)


# --- the reference, in float64 and from the formulas of the papers ------------------------------


def tables(levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """Betas and the running product of alphas: equations 2 and 4 of arXiv 2006.11239."""
    scale = 1000 / levels
    betas = torch.linspace(scale * 1e-4, scale * 0.02, levels, dtype=torch.float64)
    return betas, torch.cumprod(1 - betas, 0)


def normal_cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def reference_bound(
    clean: Tensor, noised: Tensor, predicted: Tensor, variance: Tensor, t: int, kind: str
) -> float:
    """One term, in bits per dimension, for one sample; a loop over its elements."""
    betas, bars = (table.tolist() for table in tables())
    beta, bar = betas[t], bars[t]
    before = bars[t - 1] if t else 1.0
    posterior = beta * (1 - before) / (1 - bar) if t else betas[1] * (1 - bars[0]) / (1 - bars[1])
    total = 0.0
    flat = [each.double().flatten().tolist() for each in (clean, noised, predicted, variance)]
    for x, noisy, out, v in zip(*flat, strict=True):
        guess = (
            (noisy - math.sqrt(1 - bar) * out) / math.sqrt(bar)
            if kind == "epsilon"
            else math.sqrt(bar) * noisy - math.sqrt(1 - bar) * out
        )
        share = (v + 1) / 2
        log_learned = share * math.log(beta) + (1 - share) * math.log(posterior)
        if t == 0:
            scale = math.exp(0.5 * log_learned)
            upper = normal_cdf((x - guess + 1 / 255) / scale) if x < 0.999 else 1.0
            lower = normal_cdf((x - guess - 1 / 255) / scale) if x > -0.999 else 0.0
            total -= math.log(max(upper - lower, 1e-12))
            continue
        # Equation 7 of arXiv 2006.11239, for the sample itself and for what is guessed of it.
        weight = math.sqrt(before) * beta / (1 - bar)
        rest = math.sqrt(1 - beta) * (1 - before) / (1 - bar)
        true_mean, mean = weight * x + rest * noisy, weight * guess + rest * noisy
        learned = math.exp(log_learned)
        total += 0.5 * (
            log_learned
            - math.log(posterior)
            - 1
            + posterior / learned
            + (true_mean - mean) ** 2 / learned
        )
    return total / len(flat[0]) / math.log(2)


# --- tests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_inputs_and_targets_are_those_of_diffusers(kind: Any) -> None:
    clean, noise = batch()
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    process = gaussian.Diffusion(LEVELS, kind)
    noised = process.noised(clean, noise, TIMESTEPS)
    assert torch.equal(noised, scheduler.add_noise(clean, noise, TIMESTEPS))
    target = process.target(clean, noise, TIMESTEPS)
    velocity = scheduler.get_velocity(clean, noise, TIMESTEPS)
    assert torch.equal(target, noise if kind == "epsilon" else velocity)


@pytest.mark.parametrize("levels", [1000, 100, 21])
def test_inputs_and_velocities_by_hand(levels: int) -> None:
    clean, noise = batch()
    t = TIMESTEPS % levels
    process = gaussian.Diffusion(levels, "v")
    bar = tables(levels)[1][t].reshape(-1, 1, 1, 1)
    noised = bar.sqrt() * clean + (1 - bar).sqrt() * noise
    velocity = bar.sqrt() * noise - (1 - bar).sqrt() * clean
    # diffusers keeps the running product in float32: 1 - 0.9999 has three digits fewer.
    close = {"rtol": 0, "atol": 5e-6}
    torch.testing.assert_close(process.noised(clean, noise, t).double(), noised, **close)
    torch.testing.assert_close(process.target(clean, noise, t).double(), velocity, **close)


@pytest.mark.parametrize("levels", [1000, 100, 21])
def test_any_number_of_levels_ends_in_noise(levels: int) -> None:
    betas, bars = tables(levels)
    assert float(betas.max()) < 1
    assert float(bars[-1]) < 1e-4
    clean, noise = batch()
    last = torch.full((len(clean),), levels - 1)
    noised = gaussian.Diffusion(levels, "epsilon").noised(clean, noise, last)
    assert float((noised - noise).abs().max()) < 0.01


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize("error", [0.0, 0.05, 1.0])
def test_bound_is_the_divergence_of_the_reverse_step(kind: Any, error: float) -> None:
    clean, noise = batch(1)
    clean[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.3])
    process = gaussian.Diffusion(LEVELS, kind)
    noised = process.noised(clean, noise, TIMESTEPS)
    generator = torch.Generator().manual_seed(2)
    off = error * torch.randn(clean.shape, generator=generator)
    predicted = process.target(clean, noise, TIMESTEPS) + off
    variance = torch.rand(clean.shape, generator=generator) * 2.4 - 1.2
    found = process.bound(clean, noised, predicted, variance, TIMESTEPS)
    expected = [
        reference_bound(clean[i], noised[i], predicted[i], variance[i], int(t), kind)
        for i, t in enumerate(TIMESTEPS)
    ]
    # float32 beside float64; terms below 1e-6 bits are all rounding of exp(r) - 1 - r, and at the
    # first level 1e-5 of what is predicted is a hundredth of the scale.
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=3e-4, atol=1e-6
    )


def test_bound_vanishes_for_the_true_posterior() -> None:
    clean, noise = batch()
    process = gaussian.Diffusion(LEVELS, "epsilon")
    noised = process.noised(clean, noise, TIMESTEPS)
    bound = process.bound(clean, noised, noise, torch.full_like(clean, -1.0), TIMESTEPS)
    # What is left is the rounding of diffusers' float32 schedule, seen at the least noisy levels.
    assert float(bound[1:].abs().max()) < 1e-4
    # At the first level the likelihood of a pixel is left: its bin is narrower than the Gaussian.
    assert 0 < float(bound[0]) < 3


def test_bound_teaches_the_variance_without_nan() -> None:
    clean, noise = batch()
    process = gaussian.Diffusion(LEVELS, "epsilon")
    noised = process.noised(clean, noise, TIMESTEPS)
    variance = torch.zeros_like(clean, requires_grad=True)
    process.bound(clean, noised, torch.full_like(noise, 3.0), variance, TIMESTEPS).sum().backward()
    gradient = variance.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    # A prediction that is far off wants more variance at every level above the first.
    assert (gradient[1:].flatten(1).mean(1) < 0).all()


def test_squared_error_is_of_each_sample() -> None:
    clean, noise = batch()
    expected = [float(((a - b) ** 2).mean()) for a, b in zip(clean.double(), noise, strict=True)]
    assert gaussian.squared_error(clean, noise).tolist() == pytest.approx(expected, rel=1e-6)
