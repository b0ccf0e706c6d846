"""The mixing of states under torch.compile: one graph, the same sums and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from architectures.shortcuts import Ancre, DenseFormer, Mixer, Static
from tests.architectures.shortcuts.toys import Stack, perturb

MIXER: dict[str, Callable[[], Mixer]] = {
    "ancre": lambda: Mixer(Ancre(3, init="identity"), diagonal=1.0),
    "static": lambda: Mixer(Static(3, edges="0:2, 1:3=0.5")),
    "denseformer": lambda: Mixer(DenseFormer(3)),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.mark.parametrize("name", MIXER)
def test_one_graph_trains_as_plain_autograd_does(name: str) -> None:
    ours = Stack(MIXER[name](), 4).double()
    perturb(ours)
    theirs = copy.deepcopy(ours)
    theirs.plain = True
    call = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, dtype=torch.float64)
    for stack, function in ((ours, call), (theirs, theirs)):
        function(x).square().sum().backward()
        assert all(p.grad is not None for p in stack.parameters())
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Sums of a handful of float64 terms, in another order.
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_identity_is_exact_in_bfloat16() -> None:
    stack = Stack(Mixer(Ancre(3, init="identity")), 16).bfloat16()
    perturb(stack.blocks)
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    expected = x
    for block in stack.blocks:
        expected = block(expected)
    with torch.no_grad():
        call = torch.compile(stack.eval(), fullgraph=True, backend="aot_eager")
        assert torch.equal(call(x), expected)


# Dynamo looks at the gradient of every tensor it resumes with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_history_that_outlives_its_graph_pushes() -> None:
    """Registered in a compiled part, mixed in eager code: nothing is lost in between."""
    ours = Stack(MIXER["ancre"](), 4).double()
    perturb(ours)
    theirs = copy.deepcopy(ours)
    theirs.plain = True
    blocks = list(ours.blocks)
    ours.blocks[1].forward = torch.compiler.disable(blocks[1].forward)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.compile(ours, backend="aot_eager")(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)
