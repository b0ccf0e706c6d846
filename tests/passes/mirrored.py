"""Small models for mirror maps, mapped and not, and what the tests of the pass ask of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import Mirror, Rule, mirrors
from surgery.sources import Example
from surgery.verification.outputs import leaves

MAPS = ["diagonal", "legendre", "block_iaf", "layer_iaf"]


class Net(nn.Module):
    """A convolution, a norm, a head, and a vector that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.scale_of_all = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.conv(x)).mean((2, 3))) * self.scale_of_all)


class Blocks(nn.Module):
    """A stack of residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    """A residual branch of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def net(kind: type[nn.Module] = Net, *, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def vectors() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for each in mirrors.attached(model):
            for name in each.map_parameters:
                parameter = model.get_parameter(name)
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def mapped(map: str = "block_iaf", *, model: nn.Module | None = None, **rule: Any) -> Any:  # noqa: A002
    """A model with a map that is no identity any more."""
    made = net() if model is None else model
    surgery.apply(made, Rule(Mirror(map=map), **rule))
    randomise(made)
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def result(report: surgery.Report, check: str) -> str:
    return next(row.result for row in report.rows if row.check == check)


def call(model: nn.Module, example: Example) -> dict[str, Tensor]:
    with torch.no_grad():
        found = leaves(model(*example.args, **example.kwargs))
    return {path: value for path, value in found.items() if isinstance(value, Tensor)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def by_hand(model: nn.Module, x: Tensor, kind: type[nn.Module] = Net) -> Tensor:
    """What the stock class computes with the mapped values as its parameters, in float64."""
    values = mirrors.primal(model, dict(model.named_parameters()))
    plain = net(kind).double()
    plain.load_state_dict({name: values[name] for name, _ in plain.named_parameters()})
    return plain(x)
