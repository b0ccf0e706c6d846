from __future__ import annotations

import pytest
import torch

from surgery.optim.projection import (
    MODES,
    Bases,
    empty_bases,
    principal_bases,
    sides,
    state_elements,
)

TALL, WIDE, SQUARE = (9, 5), (5, 9), (6, 6)
SIDES = {
    ("std", TALL): "right",
    ("std", WIDE): "left",
    ("std", SQUARE): "right",
    ("reverse_std", TALL): "left",
    ("reverse_std", WIDE): "right",
    ("reverse_std", SQUARE): "left",
    ("left", TALL): "left",
    ("left", WIDE): "left",
    ("right", TALL): "right",
    ("right", WIDE): "right",
    ("full", TALL): "both",
    ("full", WIDE): "both",
}


def drawn(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("mode", "shape"), SIDES, ids=str)
def test_which_sides_a_mode_projects(mode, shape) -> None:
    named = {(True, True): "both", (True, False): "left", (False, True): "right"}
    assert named[sides(shape, mode)] == SIDES[mode, shape]


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_projected_and_back_is_the_best_approximation_of_that_rank(mode, shape) -> None:
    gradient, rank = drawn(shape), 3
    bases = principal_bases(gradient, rank, mode)
    low = bases.project(gradient)
    weight = torch.zeros(shape, dtype=torch.float64)
    bases.add_back(weight, low, keep=1.0, by=1.0)
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    torch.testing.assert_close(weight, best, rtol=1e-12, atol=1e-12)  # float64 throughout
    assert low.numel() < gradient.numel()


def test_weight_and_update_are_scaled() -> None:
    gradient = drawn(TALL)
    bases = principal_bases(gradient, 2, "std")
    update, weight = drawn((9, 2)), drawn(TALL)
    expected = 0.9 * weight - 0.5 * update @ bases.right
    bases.add_back(weight, update, keep=0.9, by=-0.5)
    torch.testing.assert_close(weight, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_bases_of_bfloat16_are_computed_in_float32(mode) -> None:
    gradient = drawn((40, 24), torch.bfloat16)
    rounded = principal_bases(gradient, 4, mode)
    precise = principal_bases(gradient.float(), 4, mode)
    for ours, exact in ((rounded.left, precise.left), (rounded.right, precise.right)):
        assert (ours is None) == (exact is None)
        if ours is not None:
            assert ours.dtype == torch.bfloat16
            assert torch.equal(ours, exact.to(torch.bfloat16))


def test_autocast_does_not_lower_the_precision() -> None:
    gradient = drawn((20, 12), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = principal_bases(gradient, 4, "std")
    assert torch.equal(within.right, principal_bases(gradient, 4, "std").right)


def test_a_basis_keeps_no_memory_of_the_vectors_that_were_dropped() -> None:
    bases = principal_bases(drawn((30, 20)), 2, "full")
    for basis in (bases.left, bases.right):
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.itemsize
        assert basis.is_contiguous()


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [2, 50])
def test_room_for_received_bases_has_the_shapes_of_computed_ones(mode, shape, rank) -> None:
    gradient = drawn(shape)
    computed, empty = principal_bases(gradient, rank, mode), empty_bases(gradient, rank, mode)
    for ours, theirs in ((empty.left, computed.left), (empty.right, computed.right)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize(
    ("shape", "mode", "elements"),
    [
        ((1376, 512), "std", 128 * 512 + 2 * 128 * 1376),
        ((512, 1376), "std", 128 * 512 + 2 * 128 * 1376),
        ((512, 1376), "reverse_std", 128 * 1376 + 2 * 128 * 512),
        ((512, 1376), "full", 128 * (512 + 1376) + 2 * 128 * 128),
        ((512, 64), "std", 64 * 64 + 2 * 64 * 512),  # the rank is at most the shorter side
    ],
)
def test_elements_of_the_state(shape, mode, elements) -> None:
    assert state_elements(shape, 128, mode) == elements


def test_bases_are_orthonormal() -> None:
    bases: Bases = principal_bases(drawn((12, 7)), 4, "full")
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(bases.left.mT @ bases.left, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(bases.right @ bases.right.mT, eye, rtol=0, atol=1e-12)
