"""What runtimes are handed: blocks in disguise, and modules kept whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from surgery.capture.loops import Stack, block_of, loop_mixins
from surgery.capture.loops.targets import whole

BLOCK = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "target",
    [
        BLOCK,
        BLOCK.forward,
        BLOCK.__call__,
        functools.partial(BLOCK, input=1),
        functools.partial(functools.partial(BLOCK.forward), input=1),
    ],
)
def test_a_block_is_known_in_every_form(target: Callable[..., Any]) -> None:
    assert block_of(target) is BLOCK


@pytest.mark.parametrize("target", [None, BLOCK.extra_repr, torch.tanh, functools.partial(print)])
def test_what_runs_no_block_is_none(target: Any) -> None:
    assert block_of(target) is None


def flat(functions: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs what is inside the functions."""
    for function in chain.from_iterable(functions):
        x = function(x)
    return x


class Stage(nn.Sequential):
    """Its own forward does more than its blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 10


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(Stage(nn.ReLU(), nn.ReLU()) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return flat(self.stages, x)


def test_whole_modules_run_their_own_forward() -> None:
    model, x = Model(), torch.ones(1)
    assert flat(model.stages, x) == 1
    assert whole(flat)(model.stages, x) == 100


def test_a_model_that_looks_past_its_stages_calls_them_instead() -> None:
    stacks = tuple(Stack(f"stages.{i}", ("0", "1")) for i in range(2))
    loops = loop_mixins(Model, stacks, "tests.capture.loops.runtimes:watch")
    assert "whole(flat)(self.stages, x)" in loops.sources["forward"]
    assert not loops.refused


def test_blocks_that_would_be_taken_apart_are_refused() -> None:
    stacks = (Stack("stages", ("0", "1")),)
    loops = loop_mixins(Model, stacks, "tests.capture.loops.runtimes:watch")
    assert "the blocks are taken apart and run in sequence" in loops.refused["forward"]


def in_order(functions: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs the functions as they are."""
    for function in tuple(functions):
        x = function(x)
    return x


class Mixed(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return in_order(self.stages, x)


def test_blocks_that_hold_stacks_of_their_own_run_in_sequence() -> None:
    stacks = (Stack("stages", ("0", "1")), Stack("stages.1", ("0", "1")))
    loops = loop_mixins(Mixed, stacks, "tests.capture.loops.runtimes:watch")
    assert "steps.sequence(in_order)(self.stages, x)" in loops.sources["forward"]
    assert not loops.refused
