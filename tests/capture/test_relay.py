"""Blocks whose generated forward takes more than the block's own inputs."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery.capture import Capture, capture
from surgery.capture.graft import graft, grafts, ungraft
from surgery.capture.relay import RELAY, Rewired, code_of, forward_mixin
from surgery.errors import CaptureError
from tests.capture.compare import assert_same


class Block(nn.Module):
    """``x + f(x)``, with a branch on an argument and one on data."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        hidden = self.dropout(self.lin(x))
        hidden = hidden * 2 if hidden.mean() > 0 else hidden - 2
        if scale is not None:
            hidden = hidden * scale
        return x + hidden


@dataclass(frozen=True)
class AddStates:
    """``result + sum(weight * state)``, and the input as a new state."""

    times: float = 1.0

    def __call__(self, made: Capture, module: nn.Module) -> Capture:
        graph = copy.deepcopy(made.graph)
        first = next(iter(graph.nodes))
        with graph.inserting_after(first):
            states = graph.create_node("placeholder", "*states", name="states")
        with graph.inserting_after(first):
            weights = graph.placeholder("weights")
        # After the forward's own parameters.
        own = [node for node in graph.nodes if node.op == "placeholder"]
        own[-1].append(weights)
        weights.append(states)
        output = next(iter(reversed(graph.nodes)))
        with graph.inserting_before(output):
            mixed = graph.call_function(mix, (output.args[0], weights, states, self.times))
        for node in graph.nodes:
            if node.op in ("call_function", "output"):
                node.meta.setdefault("where", "test:1")
        output.args = ((mixed, first),)
        return made.rewritten(graph, module, extra=("weights", "*states"))


def mix(base: Tensor, weights: Tensor, states: tuple[Tensor, ...], times: float) -> Tensor:
    for weight, state in zip(weights.unbind(), states, strict=True):
        base = base + times * weight * state
    return base


def reference(block: nn.Module, x: Tensor, weights: Tensor, *states: Tensor, **kwargs: Any) -> Any:
    return mix(Block.forward(block, x, **kwargs), weights, states, 1.0), x


def rewired(seed: int = 0) -> tuple[nn.Module, type[Rewired]]:
    torch.manual_seed(seed)
    block = Block().eval()
    positive = 9 * block.lin.weight.sum(0).detach().expand(2, 4)  # takes the first branch
    mixin = forward_mixin("Rewired", capture(block, (positive,)), block, AddStates())
    graft(block, mixin)
    return block, mixin


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


STATES = (noise(3, 4), noise(3, 4) * 2)
WEIGHTS = torch.tensor([0.3, -1.2])


def test_states_go_in_and_out_at_every_kind_of_call() -> None:
    block, mixin = rewired()
    for seed in range(6):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        for kwargs in ({}, {"scale": 0.5}):
            for train in (True, False):
                block.train(train)
                torch.manual_seed(seed)
                expected = reference(block, x, WEIGHTS, *STATES, **kwargs)
                torch.manual_seed(seed)
                assert_same(block(x, RELAY, WEIGHTS, *STATES, **kwargs), expected)
    assert 2 < len(mixin.surgery_shared.variants) <= 4
    assert "def forward(self, x, scale, weights, *states):" in code_of(block)


def test_without_the_marker_it_never_runs_unmixed() -> None:
    block, _ = rewired()
    with pytest.raises(CaptureError, match="called outside of its stack"):
        block(noise(3, 4))


def test_like_modules_share_a_class_and_unlike_ones_do_not() -> None:
    class Other(Block):
        def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
            return super().forward(x, scale) * 2

    one, mixin = rewired(0)
    two, same = rewired(1)
    assert mixin is same
    assert type(one) is type(two)
    x = noise(3, 4)
    assert_same(two(x, RELAY, WEIGHTS, *STATES), reference(two, x, WEIGHTS, *STATES))
    call = (torch.ones(2, 4),)
    other = Other()
    assert forward_mixin("Rewired", capture(other, call), other, AddStates()) is not mixin
    block = Block()
    assert forward_mixin("Rewired", capture(block, call), block, AddStates(2.0)) is not mixin
    wide = Block()
    wide.dropout = nn.Identity()
    assert forward_mixin("Rewired", capture(wide, call), wide, AddStates()) is not mixin


def test_ungrafted_it_is_the_stock_block() -> None:
    block, mixin = rewired()
    ungraft(block, mixin)
    assert type(block) is Block
    assert torch.equal(block(noise(3, 4)), Block.forward(block, noise(3, 4)))


def test_deepcopy_and_pickle_in_this_process() -> None:
    block, mixin = rewired()
    x = noise(3, 4)
    pickled = pickle.loads(pickle.dumps(block))  # noqa: S301  made just here
    for copied in (copy.deepcopy(block), pickled):
        assert grafts(copied) == (mixin,)
        with torch.no_grad():
            copied.lin.weight.add_(1)
        assert_same(copied(x, RELAY, WEIGHTS, *STATES), reference(copied, x, WEIGHTS, *STATES))
    assert_same(block(x, RELAY, WEIGHTS, *STATES), reference(block, x, WEIGHTS, *STATES))


_ELSEWHERE = """
import io, sys, torch
from surgery.capture.graft import grafts
from surgery.capture.relay import RELAY, code_of
blocks, x, weights, states, expected = torch.load(sys.argv[1], weights_only=False)
assert grafts(blocks[0]) == grafts(blocks[1])
assert code_of(blocks[0]) == ""
for block, (result, new) in zip(blocks, expected, strict=True):
    mixed, state = block(x, RELAY, weights, *states)
    assert torch.equal(mixed, result) and torch.equal(state, new)
assert "*states" in code_of(blocks[0])
"""


def test_another_process_captures_at_the_first_call(tmp_path: Path) -> None:
    blocks = [rewired(seed)[0] for seed in (0, 1)]
    x = noise(3, 4)
    expected = [block(x, RELAY, WEIGHTS, *STATES) for block in blocks]
    torch.save((blocks, x, WEIGHTS, STATES, expected), tmp_path / "blocks.pt")
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "blocks.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_states_get_their_gradients(reentrant: bool) -> None:
    block, _ = rewired()
    block.train()
    results: list[list[Tensor]] = []
    for through in (False, True):
        x, weights, *states = (t.clone().requires_grad_() for t in (noise(3, 4), WEIGHTS, *STATES))
        given = (x, RELAY, weights, *states)
        torch.manual_seed(0)
        if through:
            mixed, new = checkpoint(block, *given, use_reentrant=reentrant)
        else:
            mixed, new = block(*given)
        block.zero_grad()
        (mixed.square().sum() + new.square().sum()).backward()
        grads = [t.grad for t in (x, weights, *states, *block.parameters())]
        assert all(grad is not None for grad in grads)
        results.append([mixed, *grads])
    assert_same(results[0], results[1])


def test_compiled_and_exported() -> None:
    class Model(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            mixed, new = self.block(x, RELAY, weights, x * 2, x * 3)
            return mixed + new

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.lin(x)

    block = Plain()
    graft(block, forward_mixin("Rewired", capture(block, (noise(2, 4),)), block, AddStates()))
    model, x = Model(block), noise(3, 4)
    expected = model(x, WEIGHTS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, WEIGHTS), expected, atol=1e-6)  # aot reorders nothing much
    for strict in (True, False):
        exported = torch.export.export(model, (x, WEIGHTS), strict=strict)
        assert torch.allclose(exported.module()(x, WEIGHTS), expected, atol=1e-6)
    values = {name: p * 2 for name, p in model.named_parameters()}
    called = torch.func.functional_call(model, values, (x, WEIGHTS))
    doubled = copy.deepcopy(model)
    doubled.load_state_dict(values)
    assert torch.equal(called, doubled(x, WEIGHTS))


def test_uncaptured_under_compile_says_what_to_call() -> None:
    block, mixin = rewired()
    mixin.surgery_shared.variants = ()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="run the model once on such an input beforehand"):
        compiled(noise(3, 4), RELAY, WEIGHTS, *STATES)


def test_threads_at_once() -> None:
    block, mixin = rewired()
    mixin.surgery_shared.variants = ()
    x = noise(3, 4)
    expected = reference(block, x, WEIGHTS, *STATES)
    results: list[Any] = []

    def call() -> None:
        results.append(block(x, RELAY, WEIGHTS, *STATES))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert_same(result, expected)
    assert len(mixin.surgery_shared.variants) == 1


def test_the_error_says_which_inputs_a_rewritten_graph_has() -> None:
    block = Block()
    made = capture(block, (noise(2, 4),))
    with pytest.raises(ValueError, match=r"inputs are \['x', 'scale'\], expected .*'more'"):
        made.rewritten(made.graph, block, extra=("more",))
