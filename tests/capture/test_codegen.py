"""The Python a capture is written as."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery.capture import capture
from tests.capture.compare import assert_same


class Block(nn.Module):
    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.gain = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        hidden = self.mlp(self.norm(x))
        with torch.no_grad():
            scale = hidden.abs().mean() * self.index
        hidden = hidden.view(batch * length, -1) * self.gain / scale
        if length > 2:
            hidden = hidden + 1
        return x + hidden.view_as(x)


SOURCE = """\
def accepts(self, x, mask):
    return (
        isinstance(x, Tensor) and x.ndim == 3
        and mask is None
        and torch.is_autocast_enabled('cpu') is False
        and torch.is_autocast_enabled('cuda') is False
        and x.shape[1] > 2
    )


def forward(self, x, mask):
    mlp = self.mlp(self.norm(x))
    with torch.no_grad():
        mul = mlp.abs().mean() * self.index
    add = mlp.view(x.shape[0] * x.shape[1], -1) * self.gain / mul + 1
    del mlp, mul
    return x + add.view_as(x)
"""


def test_reads_like_the_original() -> None:
    assert capture(Block(), (torch.randn(2, 3, 8),)).source == SOURCE


def test_equal_modules_share_one_code_object() -> None:
    one = capture(Block(1), (torch.randn(2, 3, 8),))
    other = capture(Block(2), (torch.randn(4, 5, 8),))
    assert one.source == other.source
    assert one._run is other._run  # the functions, not only their text


def test_a_checkpoint_stays_a_checkpoint() -> None:
    class Saves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.lin, x, use_reentrant=False) * 2

    module = Saves()
    captured = capture(module, (torch.ones(1, 8),))
    assert "checkpoint(checkpointed_0, x, use_reentrant=False" in captured.source
    runs: list[int] = []
    module.lin.register_forward_pre_hook(lambda *_: runs.append(1))
    captured.forward(module, torch.ones(1, 8, requires_grad=True)).sum().backward()
    assert len(runs) == 2  # forward, and again in backward


def test_dead_values_are_freed() -> None:
    """What is needed for one more line is gone after that line, long before the return."""

    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = x + 1
            second = first * first
            third = second * second
            fourth = third * third
            return fourth * fourth

    lines = capture(Chain(), (torch.ones(4),)).source.splitlines()
    assert lines[lines.index("    mul = add * add") + 1] == "    del add"
    assert lines[lines.index("    mul_1 = mul * mul") + 1] == "    del mul"


def test_rewritten_graph() -> None:
    module = Block()
    captured = capture(module, (torch.randn(2, 3, 8),))
    graph = copy.deepcopy(captured.graph)
    output = next(iter(reversed(graph.nodes)))
    final = output.args[0]
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.neg, (final,)),)
    edited = captured.rewritten(graph, module)
    x = torch.randn(2, 3, 8)
    assert_same(edited.forward(module, x), -module(x))
