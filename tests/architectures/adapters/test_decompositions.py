"""Leading singular values, exact and randomised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from architectures.adapters.decompositions import leading


def decaying(rows: int, columns: int, power: float = 1.0) -> Tensor:
    """A matrix whose singular values fall like 1 / k^power."""
    generator = torch.Generator().manual_seed(0)
    size = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, size, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(columns, size, generator=generator)).Q
    return U @ torch.diag(1 / torch.arange(1, size + 1) ** power) @ V.T


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (2, 3, 20, 30)])
@pytest.mark.parametrize("iterations", [None, 4])
def test_best_approximation_of_its_rank(shape: tuple[int, ...], iterations: int | None) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(0)
    U, S, V = leading(weight, 4, iterations=iterations, generator=generator)
    assert U.shape == (*shape[:-1], 4)
    assert S.shape == (*shape[:-2], 4)
    assert V.shape == (*shape[:-2], 4, shape[-1])
    eye = torch.eye(4, dtype=torch.float64).expand(*shape[:-2], 4, 4)
    torch.testing.assert_close(U.mT @ U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(V @ V.mT, eye, rtol=0, atol=1e-12)
    true = torch.linalg.svdvals(weight)
    energy = (S.square().sum(-1) / true[..., :4].square().sum(-1)).min()
    assert energy > (1 - 1e-12 if iterations is None else 0.99)
    part = (U * S.unsqueeze(-2)) @ V
    error = (weight - part).square().sum((-2, -1))
    best = true[..., 4:].square().sum(-1)
    assert (error / best).max() < (1 + 1e-12 if iterations is None else 1.02)


def test_randomised_is_as_good_as_exact_where_the_spectrum_falls() -> None:
    weight = decaying(60, 80)
    exact = leading(weight, 5)
    near = leading(weight, 5, iterations=4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(near.S, exact.S, rtol=1e-5, atol=0)
    # Up to the sign of each vector.
    overlap = (near.V @ exact.V.T).abs()
    torch.testing.assert_close(overlap, torch.eye(5), rtol=0, atol=1e-3)


def test_only_the_generator_is_drawn_from() -> None:
    weight = torch.randn(20, 30)
    before = torch.random.get_rng_state()
    runs = [
        leading(weight, 3, iterations=1, generator=torch.Generator().manual_seed(seed)).U
        for seed in (5, 5, 6)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("iterations", [None, 2])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, torch.nan], [0.0, torch.inf]]), "2 of the 4 values"),
        (torch.zeros(6, 5), "0 singular values that are not zero, and rank 2 needs 2"),
        (torch.ones(6, 5), "1 singular values that are not zero"),
        (torch.stack([torch.eye(4), torch.zeros(4, 4)]), "0 singular values"),
    ],
)
def test_weights_without_such_a_part_are_refused(
    weight: Tensor, message: str, iterations: int | None
) -> None:
    with pytest.raises(ValueError, match=message):
        leading(weight, 2, iterations=iterations, generator=torch.Generator().manual_seed(0))


def test_half_precision_is_decomposed_in_float32() -> None:
    weight = decaying(20, 30).bfloat16()
    found = leading(weight, 3)
    assert found.S.dtype == torch.float32
    torch.testing.assert_close(found.S, torch.linalg.svdvals(weight.float())[:3])
