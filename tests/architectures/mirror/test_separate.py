"""Diagonal and Legendre: true mirror maps of one tensor each, and what they cost."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from architectures.mirror import Diagonal, Legendre, MirrorMap

SHAPES = [(), (5,), (4, 3), (2, 3, 2), (3, 2, 2, 2)]
KINDS: dict[str, tuple[type[MirrorMap], dict[str, Any]]] = {
    "diagonal": (Diagonal, {}),
    "diagonal, one piece": (Diagonal, {"pieces": 1, "radius": 0.3}),
    "diagonal, per element": (Diagonal, {"share": "element", "pieces": 4}),
    "legendre": (Legendre, {}),
    "legendre, many directions": (Legendre, {"rank": 9}),
}


def build(name: str, shape: tuple[int, ...], *, seed: int | None = 1) -> Any:
    kind, options = KINDS[name]
    made = kind([shape], options=kind.Options(**options), dtype=torch.float64)
    made.start(torch.Generator().manual_seed(0))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return made.requires_grad_(False)


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2


@pytest.fixture(params=KINDS, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


def test_it_starts_as_the_identity_in_every_bit(name: str, shape: tuple[int, ...]) -> None:
    made, z = build(name, shape, seed=None), numbers(shape)
    assert torch.equal(made(z)[0], z)
    # The inverse of the identity has no rounding either.
    assert torch.equal(made.dual(z)[0], z)


def test_the_jacobian_is_symmetric_positive_definite(name: str, shape: tuple[int, ...]) -> None:
    made, z = build(name, shape), numbers(shape)
    jacobian = jacrev(lambda z: made(z)[0])(z).reshape(z.numel(), z.numel())
    torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(jacobian).min()) > 1e-3
    if "diagonal" in name:
        assert torch.equal(jacobian, jacobian.diagonal().diag())
    elif z.numel() > 1:
        assert float((jacobian - jacobian.diagonal().diag()).abs().max()) > 1e-3


def test_the_inverse(name: str, shape: tuple[int, ...]) -> None:
    made, z = build(name, shape), numbers(shape)
    # Closed for the diagonal; of legendre 1e-12 of the sums in it, times their condition here.
    torch.testing.assert_close(made.dual(made(z)[0])[0], z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made(made.dual(z)[0])[0], z, rtol=1e-9, atol=1e-9)


def test_it_is_monotone(name: str, shape: tuple[int, ...]) -> None:
    made = build(name, shape)
    for seed in range(5):
        a, b = numbers(shape, seed), numbers(shape, seed + 100)
        assert float(((made(a)[0] - made(b)[0]) * (a - b)).sum()) > 0


def test_gradients_are_right_and_right_again(name: str) -> None:
    made, z = build(name, (2, 3)), numbers((2, 3)).requires_grad_()
    names = [key for key, _ in made.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in made.parameters()]

    def call(z: Tensor, *tensors: Tensor) -> Tensor:
        return functional_call(made, dict(zip(names, tensors, strict=True)), (z,))[0]

    assert torch.autograd.gradcheck(call, (z, *values))
    assert torch.autograd.gradgradcheck(call, (z, *values))


def test_every_parameter_gets_a_gradient_after_one_step(name: str) -> None:
    made, z = build(name, (4, 3), seed=None), numbers((4, 3))
    for _ in range(2):
        made.requires_grad_().zero_grad()
        (made(z)[0] - torch.ones(4, 3)).square().sum().backward()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.sub_(parameter.grad, alpha=1e-3)
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


def test_tasks_run_side_by_side(name: str) -> None:
    made, z = build(name, (4, 3)), torch.stack([numbers((4, 3), seed) for seed in range(3)])
    together = vmap(lambda z: made(z)[0])(z)
    alone = torch.stack([made(each)[0] for each in z])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_what_they_cost() -> None:
    """Of a matrix of 6 x 4: a curve, a curve per number, and vectors for each direction."""
    sizes = {
        name: sum(p.numel() for p in build(name, (6, 4)).parameters())
        for name in ("diagonal", "diagonal, per element", "legendre")
    }
    assert sizes == {
        "diagonal": 5 + 1,
        "diagonal, per element": (4 + 1) * 24,
        "legendre": (6 + 4) + 4 * (6 + 4) + 4,
    }


# Diagonal.


def prox(z: Tensor, values: Tensor, radius: float) -> Tensor:
    """MetaProxNet's learned prox as its paper has it: interpolated between control points.

    The index of the piece is clamped, which goes on beyond the outer points in a straight line.
    """
    pieces = len(values) - 1
    step = 2 * radius / pieces
    index = ((z + radius) / step).floor().clamp(0, pieces - 1).long()
    low, high = values[index], values[index + 1]
    return low + (high - low) * ((z + radius) / step - index)


def test_the_learned_prox_of_metaproxnet_is_a_special_case() -> None:
    made = Diagonal([(50,)], dtype=torch.float64)
    values = torch.tensor([-3.0, -1.0, -0.2, 0.1, 0.9, 1.1], dtype=torch.float64)
    assert made.grid == pytest.approx((-2, -1.2, -0.4, 0.4, 1.2, 2))
    made.set_control_points(values)
    z = torch.linspace(-4, 4, 50, dtype=torch.float64)
    # Both are sums of a few products: rounding of float64.
    torch.testing.assert_close(made(z)[0], prox(z, values, 2.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.control_points(), values, rtol=1e-12, atol=1e-12)


def test_a_prox_per_element() -> None:
    options = Diagonal.Options(share="element")
    made = Diagonal([(2,)], options=options, dtype=torch.float64)
    values = torch.tensor([[-2.0, -9], [-1, -3], [0, -2], [1, 0], [2, 1], [3, 8]]).double()
    made.set_control_points(values)
    z = torch.tensor([1.7, -3.0], dtype=torch.float64)
    expected = torch.stack([prox(z[i : i + 1], values[:, i], 2.0)[0] for i in range(2)])
    torch.testing.assert_close(made(z)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_prox_that_does_not_increase_is_no_mirror_map() -> None:
    made = Diagonal([(3,)])
    with pytest.raises(ValueError, match="do not increase"):
        made.set_control_points(torch.tensor([0.0, 1, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"expected control points \(6,\), got \(5,\)"):
        made.set_control_points(torch.arange(5.0))


def curve(log_slopes: list[float], dtype: torch.dtype, size: int = 1) -> Diagonal:
    options = Diagonal.Options(pieces=len(log_slopes))
    made = Diagonal([(size,)], options=options, dtype=dtype)
    with torch.no_grad():
        made.log_slopes.copy_(torch.tensor(log_slopes))
        made.shift.zero_()
    return made.requires_grad_(False)


def integral(made: Diagonal, z: float) -> tuple[float, float]:
    """∫ of the slopes from 0 to z in exact fractions, and the slope at z."""
    inner = [Fraction(point) for point in made.grid[1:-1]]
    ends = [-(10**6), *inner, 10**6]
    slopes = [Fraction(math.exp(w)) for w in made.log_slopes.tolist()]
    upto = [
        sum(s * (min(max(at, a), b) - a) for s, a, b in zip(slopes, ends, ends[1:], strict=False))
        for at in (Fraction(0), Fraction(z))
    ]
    return float(upto[1] - upto[0]), float(slopes[sum(point <= z for point in inner)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    raw=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_is_the_integral_of_its_slopes_whatever_they_are(
    raw: list[float], dtype: torch.dtype
) -> None:
    """So it increases, as the slopes are positive: also where rounding would hide a small one."""
    made = curve(raw, dtype)
    points = [-7.0, -2.1, -1.3, -0.9, -0.3, -1e-3, 0.0, 1e-5, 0.2, 0.7, 1.5, 3.0]
    z = torch.tensor(points, dtype=dtype)
    for at, phi in zip(z.tolist(), made(z)[0].tolist(), strict=True):
        expected, slope = integral(made, at)
        # A few roundings, of the value and of the product with the slope there.
        room = 8 * torch.finfo(dtype).eps * (abs(expected) + slope * abs(at))
        assert abs(phi - expected) <= room


@pytest.mark.parametrize("log_slope", [-15.0, 15.0])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_flat_and_steep_curves_increase_and_invert_in_float32(
    log_slope: float, pieces: int
) -> None:
    made, z = curve([log_slope] * pieces, torch.float32), torch.linspace(-5, 5, 2001)
    phi = made(z)[0]
    assert bool((phi.diff() > 0).all())
    # Slopes of 3e-7 and 3e6: some units in the last place of z.
    torch.testing.assert_close(made.dual(phi)[0], z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pieces", [2, 4, 5])
@pytest.mark.parametrize("log_slope", [-2.0, 0.5])
def test_the_derivative_where_pieces_meet(pieces: int, log_slope: float) -> None:
    """Of even numbers of pieces two meet at 0, where many parameters begin."""
    slopes = [log_slope + 0.1 * k for k in range(pieces)]
    made = curve(slopes, torch.float64)
    bends = torch.tensor(made.grid[1:-1], dtype=torch.float64)
    derivative = torch.func.vmap(grad(lambda z: made(z)[0]))(bends)
    upper = made.log_slopes[1:].exp()
    torch.testing.assert_close(derivative, upper, rtol=1e-12, atol=0)
    inverse = torch.func.vmap(grad(lambda phi: made.dual(phi)[0]))(made(bends)[0])
    torch.testing.assert_close(inverse, 1 / upper, rtol=1e-12, atol=0)


def test_numbers_without_end_stay_what_they_are() -> None:
    """A mask of -inf that is a parameter."""
    made, z = curve([0.0] * 5, torch.float32), torch.tensor([math.inf, -math.inf, 1.0])
    assert torch.equal(made(z)[0], z)
    assert torch.equal(made.dual(z)[0], z)


# Legendre.


def test_legendre_is_the_gradient_of_its_potential(shape: tuple[int, ...]) -> None:
    made, z = build("legendre", shape), numbers(shape)
    torch.testing.assert_close(grad(made.potential)(z), made(z)[0], rtol=1e-12, atol=1e-12)


def test_the_potential_is_strictly_convex() -> None:
    made = build("legendre", (4, 3))
    for seed in range(20):
        a, b = numbers((4, 3), seed), numbers((4, 3), seed + 50)
        middle = made.potential((a + b) / 2)
        assert float(middle) < float((made.potential(a) + made.potential(b)) / 2)


def test_the_inverse_of_a_stiff_map() -> None:
    made = build("legendre", (6, 5))
    with torch.no_grad():
        for factor in made.factors:
            factor.mul_(20)
    phi = numbers((6, 5)) * 50
    torch.testing.assert_close(made(made.dual(phi)[0])[0], phi, rtol=1e-7, atol=1e-7)


def uneven(directions: float, scales: float, seed: int, shape: tuple[int, ...] = (4, 3)) -> Any:
    """A map whose scales differ by e to the power of ``scales`` and more, with 9 directions."""
    made = Legendre([shape], options=Legendre.Options(rank=9), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * (scales if "scale" in name else directions))
    return made.requires_grad_(False)


@pytest.mark.parametrize("seed", [25, 0])
@pytest.mark.parametrize("far", [1e2, 1e4])
def test_the_inverse_of_uneven_maps_far_out(seed: int, far: float) -> None:
    """Newton's method on the residual alone gets stuck in the first."""
    made = uneven(10, 4, seed)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double() * far
    phi = made(z)[0]
    again = made(made.dual(phi)[0])[0]
    # 1e-12 of sums of which the terms exceed phi by some orders of magnitude.
    torch.testing.assert_close(again, phi, rtol=0, atol=1e-7 * float(phi.abs().max()))


def test_an_inverse_that_float64_does_not_hold_is_told() -> None:
    made = uneven(10, 4, 25)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(25)).double()
    with pytest.raises(ArithmeticError, match="float64 does not hold the inverse"):
        made.dual(made(z)[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("far", [1.0, 1e4])
def test_the_jacobian_is_the_formula_of_the_docstring(seed: int, far: float) -> None:
    """``diag(exp(d)) + Σ_k a_k a_kᵀ (1 - tanh²)``, from d and a_k written out in full."""
    made = uneven(1, 0.5, seed)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double() * far
    d = (made.log_scales[0][:, None] + made.log_scales[1]).flatten()
    a = torch.einsum("ki,kj->kij", *made.factors).flatten(1)
    slopes = 1 - torch.tanh(a @ z.flatten() + made.offsets).square()
    expected = d.exp().diag() + a.T @ (slopes[:, None] * a)
    jacobian = jacrev(lambda z: made(z)[0])(z).reshape(12, 12)
    torch.testing.assert_close(jacobian, expected, rtol=1e-9, atol=1e-9)
    assert float(torch.linalg.eigvalsh(expected).min()) >= 0.99 * float(d.exp().min())


def test_what_has_no_inverse_is_told() -> None:
    made = build("legendre", (3,))
    with pytest.raises(ArithmeticError, match="did not come within 1e-12"):
        made.dual(torch.tensor([1.0, math.nan, 0.0]).double())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Diagonal, {"pieces": 0}, "pieces=0"),
        (Diagonal, {"radius": 0.0}, "must be positive, got 0.0"),
        (Diagonal, {"radius": math.nan}, "must be positive, got nan"),
        (Diagonal, {"radius": math.inf}, "float32 does not hold pieces that cover ±inf"),
        (Diagonal, {"radius": 1e300}, r"float32 does not hold pieces that cover ±1e\+300"),
        (Diagonal, {"radius": 1e-300}, "float32 does not hold pieces that cover ±1e-300"),
        (Legendre, {"rank": 0}, "rank=0"),
    ],
)
def test_what_cannot_be_built(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([(3,)], options=kind.Options(**options))
    with pytest.raises(ValueError, match="for one tensor, got 2"):
        kind([(3,), (4,)])
