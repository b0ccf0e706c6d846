"""NoRA+: normalised inverse Gram matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery.optim import Factors
from surgery.optim.nora_plus import NoRAPlus


def normalised(gram: torch.Tensor) -> torch.Tensor:
    inverse = torch.linalg.inv(gram + 1e-6 * torch.eye(len(gram), dtype=gram.dtype))
    return inverse / inverse.norm()


@pytest.mark.parametrize("zero", [False, True])
def test_gradients_are_those_of_the_formula(zero):
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 9), (7, 4)] * 2
    A, B, grad_A, grad_B = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes
    )
    if zero:
        B.zero_()
    each = Factors("layer", nn.Parameter(A), nn.Parameter(B), 2.0)
    each.A.grad, each.B.grad = grad_A.clone(), grad_B.clone()
    NoRAPlus([each]).before(torch.optim.SGD([each.A, each.B]))
    expected = grad_A if zero else normalised(B.T @ B) @ grad_A
    torch.testing.assert_close(each.A.grad, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(each.B.grad, grad_B @ normalised(A @ A.T), rtol=1e-9, atol=1e-12)


def test_a_singular_gram_matrix_gives_finite_gradients():
    A, B = torch.ones(4, 9) * 1e3, torch.ones(7, 4) * 1e3
    each = Factors("layer", nn.Parameter(A), nn.Parameter(B), 2.0)
    each.A.grad, each.B.grad = torch.randn(4, 9), torch.randn(7, 4)
    NoRAPlus([each]).before(torch.optim.SGD([each.A, each.B]))
    assert each.A.grad.isfinite().all()
    assert each.B.grad.isfinite().all()


def test_an_option_out_of_range_is_refused():
    with pytest.raises(ValueError, match="eps must be positive"):
        NoRAPlus([], eps=0.0)
