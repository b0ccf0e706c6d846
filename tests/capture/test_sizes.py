"""Sizes carried along from an input are known before anything runs; others are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.capture import capture


class Asks(nn.Module):
    """Branches on a size of what ``make`` made."""

    def __init__(self, make: Callable[[Asks, Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.make = make
        self.dim = dim
        self.lin = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(8)
        self.embed = nn.Embedding(9, 8)
        self.other = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.make(self, x).shape[self.dim] > 4 else x - 1


CARRIED: list[tuple[Callable[[Asks, Tensor], Tensor], int]] = [
    (lambda m, x: x, 1),
    (lambda m, x: x + 1, 1),
    (lambda m, x: torch.ones(1) * x, 1),
    (lambda m, x: m.lin(x), 1),
    (lambda m, x: m.lin(m.norm(x)).softmax(-1), 1),
    (lambda m, x: m.embed(x.long()), 1),
    (lambda m, x: x.transpose(0, 1), 0),
    (lambda m, x: x.permute(1, 0, 2).contiguous(), 0),
    (lambda m, x: x.unsqueeze(0), 2),
    (lambda m, x: x[:, None], 2),
    (lambda m, x: x[..., :3], 1),
    (lambda m, x: x[0], 0),
    (lambda m, x: x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2), 2),
    (lambda m, x: x.reshape((x.shape[1], -1)), 0),
    (lambda m, x: x[:1].expand(x.shape[0], -1, -1), 1),
    (lambda m, x: torch.cat([x, -x], -1), 1),
    (lambda m, x: x.chunk(2, -1)[0], 1),
    (lambda m, x: x.unbind(0)[0], 0),
    (lambda m, x: functional.scaled_dot_product_attention(x, x, x), 1),
    (lambda m, x: functional.dropout(functional.gelu(x), 0.1), 1),
]


@pytest.mark.parametrize(("make", "dim"), CARRIED)
def test_a_carried_size_is_checked_beforehand(
    make: Callable[[Asks, Tensor], Tensor], dim: int
) -> None:
    module = Asks(make, dim)
    captured = capture(module, (torch.ones(2, 5, 8),))
    assert "and x.shape[1] > 4" in captured.source
    assert captured.accepts(module, torch.ones(3, 7, 8))
    assert not captured.accepts(module, torch.ones(3, 4, 8))


MADE: list[tuple[Callable[[Asks, Tensor], Tensor], int]] = [
    (lambda m, x: m.other(x), 1),  # a child that is not looked into
    (lambda m, x: torch.cat([x, x], 1), 1),
    (lambda m, x: x[:, 0:5], 1),
    (lambda m, x: x.flatten(0, 1), 0),
    (lambda m, x: functional.pad(x, (0, 0, 1, 1)), 1),
    (lambda m, x: x[x > 0], 0),
]


@pytest.mark.parametrize(("make", "dim"), MADE)
def test_any_other_size_is_checked_on_the_way(
    make: Callable[[Asks, Tensor], Tensor], dim: int
) -> None:
    source = capture(Asks(make, dim), (torch.ones(2, 5, 8),)).source
    assert "x.shape[1] > 4" not in source.partition("def forward")[0]
    assert "raise Miss(0" in source


def test_inputs_that_agree_are_guarded_to_agree() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = x + y
            return z.reshape(z.shape[0] * z.shape[1], -1)

    module = Adds()
    captured = capture(module, (torch.ones(2, 5, 8), torch.ones(1, 5, 8)))
    assert captured.accepts(module, torch.ones(3, 7, 8), torch.ones(1, 7, 8))
    assert not captured.accepts(module, torch.ones(3, 7, 8), torch.ones(3, 7, 8))
    assert not captured.accepts(module, torch.ones(3, 1, 8), torch.ones(1, 7, 8))
