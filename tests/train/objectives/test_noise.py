"""Randomness of a sample: by its position, whatever is beside it, and rightly distributed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from surgery.train.objectives import noise

SHAPE = (3, 6, 6)


def drawn(
    positions: list[int], *, seed: int = 1, step: int = 5, dropout: float = 0.1
) -> noise.Drawn:
    like = torch.zeros(len(positions), *SHAPE)
    return noise.for_training(seed, step, positions, like, levels=1000, dropout=dropout)


def parts(one: noise.Drawn) -> tuple[Tensor, Tensor, Tensor]:
    return one.timesteps, one.dropped, one.noise


def test_a_sample_has_the_same_randomness_in_any_batch() -> None:
    whole = parts(drawn(list(range(40, 72))))
    halves = [parts(drawn(list(range(start, start + 16)))) for start in (40, 56)]
    for one, *two in zip(whole, *halves, strict=True):
        assert torch.equal(one, torch.cat(two))
    backwards = parts(drawn(list(range(71, 39, -1))))
    for one, other in zip(whole, backwards, strict=True):
        assert torch.equal(one, other.flip(0))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = drawn([3])
    torch.rand(5)
    again = drawn([3])
    assert torch.equal(first.noise, again.noise)
    torch.set_rng_state(before)
    drawn([4])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changed", [{"seed": 2}, {"step": 6}])
def test_seed_and_step_change_everything(changed: dict[str, int]) -> None:
    positions = list(range(64))
    one, other = drawn(positions), drawn(positions, **changed)
    assert (one.timesteps == other.timesteps).sum() < 4
    assert float((one.noise * other.noise).mean().abs()) < 0.05


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_rate_of_dropped_labels(rate: float) -> None:
    count = 20_000
    like = torch.zeros(count, 1, 1, 1)
    found = noise.for_training(0, 1, range(count), like, levels=1000, dropout=rate)
    # Five standard deviations of a binomial share.
    margin = 5 * math.sqrt(rate * (1 - rate) / count)
    assert abs(float(found.dropped.double().mean()) - rate) <= margin


def test_timesteps_are_uniform_and_independent_of_what_is_dropped() -> None:
    count, levels = 20_000, 10
    like = torch.zeros(count, 1, 1, 1)
    found = noise.for_training(0, 1, range(count), like, levels=levels, dropout=0.3)
    shares = torch.bincount(found.timesteps, minlength=levels) / count
    assert len(shares) == levels
    assert float((shares - 1 / levels).abs().max()) < 5 * math.sqrt(0.1 * 0.9 / count)
    kept = found.timesteps[~found.dropped].double().mean()
    assert float(kept) == pytest.approx(4.5, abs=0.12)


def test_noise_is_standard_normal_and_differs_between_samples() -> None:
    found = drawn(list(range(2000))).noise
    assert found.shape == (2000, *SHAPE)
    # 216 000 values: a standard deviation of the mean is 0.0022, of the variance 0.0030.
    assert abs(float(found.mean())) < 0.011
    assert abs(float(found.var()) - 1) < 0.015
    assert abs(float(found.pow(4).mean()) - 3) < 0.15
    assert len(torch.unique(found.flatten(1)[:, 0])) == 2000
    assert abs(float((found[1:] * found[:-1]).mean())) < 0.011


def test_evaluation_is_the_same_each_time_and_even_over_levels() -> None:
    like = torch.zeros(200, 1, 2, 2)
    found = noise.for_evaluation(range(200), like, levels=1000)
    again = noise.for_evaluation(range(100, 200), like[100:], levels=1000)
    assert torch.equal(found.timesteps[100:], again.timesteps)
    assert torch.equal(found.noise[100:], again.noise)
    assert not found.dropped.any()
    # No tenth of the levels is off by more than one sample in ten.
    tenths = torch.bincount(found.timesteps // 100, minlength=10)
    assert tenths.tolist() == pytest.approx([20] * 10, abs=2)


def test_purposes_do_not_share_noise() -> None:
    like = torch.zeros(1, *SHAPE)
    train = noise.for_training(0, 0, [0], like, levels=10, dropout=0.0).noise
    held_out = noise.for_evaluation([0], like, levels=10).noise
    image = torch.randn(like.shape, generator=noise.generator(0, 0))
    assert not torch.equal(train, held_out)
    assert not torch.equal(train, image)
    assert not torch.equal(held_out, image)
