"""Tensors that share memory, and what was written to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.capture import capture, trace_model


class Scratch(nn.Module):
    """Writes to tensors that nobody holds any longer, whose storages are free to be used again."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(30):
            torch.zeros(4).add_(x.sum())
            x = x * 2
        return x


class Viewed(nn.Module):
    """Branches on a view that was taken before its memory was written to."""

    def forward(self, x: Tensor) -> Tensor:
        state = x * 0
        view = state.view(-1)
        state.add_(1)
        return x + 1 if view.sum() > 0 else x - 1


def test_the_storage_of_a_freed_tensor_is_not_taken_for_another() -> None:
    trace = trace_model(Scratch(), (torch.ones(4),))
    products = [node for node in trace.graph.nodes if "mul" in node.name]
    assert len(products) == 30
    assert [node.name for node in products if "written_by" in node.meta] == []


def test_a_write_is_seen_through_a_view_that_is_older() -> None:
    trace = trace_model(Viewed(), (torch.ones(3),))
    (view,) = [node for node in trace.graph.nodes if node.target == "view"]
    assert [node.target for node in view.meta["written_by"]] == ["add_"]
    made = capture(Viewed(), (torch.ones(3),))
    assert torch.equal(made.forward(Viewed(), torch.ones(3)), torch.full((3,), 2.0))
