"""Every driver of every tiny model, its loops rewritten: nothing changes, nothing is bypassed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery.capture.graft import graft, stock_class
from surgery.capture.loops import Stack, loop_mixins
from surgery.capture.structure import tensors
from surgery.select.sites import is_container
from surgery.select.stacks import find_stacks
from tests import zoo
from tests.capture.loops import runtimes
from tests.capture.loops.runtimes import scaled


def drivers(model: nn.Module) -> dict[str, list[Stack]]:
    """The stacks of a model by the path of the module whose code runs them."""
    found: dict[str, list[Stack]] = {}
    for stack in find_stacks(model):
        names = tuple(layer.rpartition(".")[2] for layer in stack.layers)
        holder = model.get_submodule(stack.path)
        lists = is_container(holder) and not isinstance(holder, nn.Sequential)
        owner, _, name = stack.path.rpartition(".")
        path, container = (owner, name) if lists else (stack.path, "")
        found.setdefault(path, []).append(Stack(container, names))
    return found


def rewrite(model: nn.Module, runtime: str) -> list[list[nn.Module]]:
    """Graft rewritten loops onto every driver; the blocks of each stack."""
    blocks: list[list[nn.Module]] = []
    for path, stacks in drivers(model).items():
        driver = model.get_submodule(path)
        loops = loop_mixins(
            stock_class(driver), tuple(stacks), f"tests.capture.loops.runtimes:{runtime}"
        )
        assert "forward" not in loops.refused, loops.refused
        for mixin in loops.mixins:
            graft(driver, mixin)
        for stack in stacks:
            holder = driver.get_submodule(stack.container)
            blocks.append([holder.get_submodule(name) for name in stack.members])
    return blocks


def run(model: nn.Module, example: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(*example.args, **example.kwargs))


@pytest.mark.parametrize("name", zoo.names())
def test_nothing_changes_and_every_block_is_seen(name: str) -> None:
    model, example = zoo.build(name)
    before = run(model, example)
    stacks = rewrite(model, "watch")
    runtimes.ran()
    after = run(model, example)
    seen = [id(block) for block in runtimes.ran()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for blocks in stacks:
        expected = [id(block) for block in blocks]
        assert [block for block in seen if block in expected] == expected


@pytest.mark.parametrize("name", zoo.names())
def test_a_runtime_that_changes_outputs_acts_like_hooks(name: str) -> None:
    model, example = zoo.build(name)
    blocks = [
        model.get_submodule(path).get_submodule(stack.container).get_submodule(member)
        for path, stacks in drivers(model).items()
        for stack in stacks
        for member in stack.members
    ]
    hooks = [block.register_forward_hook(lambda _m, _a, out: scaled(out)) for block in blocks]
    expected = run(model, example)
    for hook in hooks:
        hook.remove()
    rewrite(model, "scale")
    found = run(model, example)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
