"""A stack of small blocks that mixes through a History, and the same by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from architectures.shortcuts import History, Mixer


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """``x_{k+1} = block_k(x_k) + Σ_j W_kj x_j``; with ``plain``, written as it reads."""

    def __init__(self, mixer: Mixer, width: int, *, plain: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(mixer.topology.sites)])
        self.mixer = mixer
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        run = plain if self.plain else mixed
        return run(self.blocks, self.mixer(), self.mixer.support, x)[-1]


def mixed(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    weights: Tensor,
    support: Sequence[Sequence[int]],
    x: Tensor,
) -> list[Tensor]:
    """``x_0, x_1, ..., x_K`` with a History."""
    history = History(weights, support)
    states = [x]
    for block in blocks:
        states.append(history.leave(block(history.enter(states[-1]))))
    return states


def plain(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    weights: Tensor,
    support: Sequence[Sequence[int]],
    x: Tensor,
) -> list[Tensor]:
    """``x_0, x_1, ..., x_K`` without one."""
    states = [x]
    for site, block in enumerate(blocks):
        y = block(states[-1])
        if weights.shape[1] > len(blocks):
            y = weights[site, len(blocks)] * y
        for state in support[site]:
            y = y + weights[site, state] * states[state]
        states.append(y)
    return states


def perturb(module: nn.Module, scale: float = 1.0) -> None:
    """Move every parameter away from its first value; logits are divided by τ = 0.01."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = 0.01 if "logits" in name else 0.3
            parameter.add_(torch.randn_like(parameter) * size * scale)
