"""Every driver of every tiny model, its loops rewritten: nothing changes, nothing is bypassed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import zoo
from tests.capture.compare import assert_same
from tests.capture.loops import runtimes
from tests.capture.loops.grafting import blocks_of, rewrite
from tests.capture.loops.runtimes import scaled


def run(model: nn.Module, example: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(*example.args, **example.kwargs)


@pytest.mark.parametrize("name", zoo.names())
def test_nothing_changes_and_every_block_is_seen(name: str) -> None:
    model, example = zoo.build(name)
    before = run(model, example)
    made = rewrite(model, "watch")
    assert {reason for loops in made.values() for reason in loops.refused.values()} == set()
    runtimes.ran()
    after = run(model, example)
    seen = [id(block) for block in runtimes.ran()]
    assert_same(before, after)
    for blocks in blocks_of(model):
        expected = [id(block) for block in blocks]
        assert [block for block in seen if block in expected] == expected


@pytest.mark.parametrize("name", zoo.names())
def test_a_runtime_that_changes_outputs_acts_like_hooks(name: str) -> None:
    model, example = zoo.build(name)
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: scaled(out))
        for blocks in blocks_of(model)
        for block in blocks
    ]
    expected = run(model, example)
    for hook in hooks:
        hook.remove()
    rewrite(model, "scale")
    assert_same(run(model, example), expected)
