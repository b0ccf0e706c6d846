"""GaLore on two gloo ranks: one set of bases, whatever a rank's own SVD would give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from surgery.optim import GaLoreAdamW
from tests.optim.two_ranks import batch, differing, half, network, on_two_ranks, train

STEPS = range(5)


def optimizer_of(model: nn.Module, group: Any = None) -> GaLoreAdamW:
    tall, wide, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    groups = [
        {"params": [tall.weight, wide.weight], "rank": 3, "gap": 2},
        {"params": [last.weight], "rank": 2, "gap": 3, "mode": "full"},
        {"params": [layer.bias for layer in (tall, wide, last)]},
    ]
    return GaLoreAdamW(groups, lr=0.05, process_group=group)


def held(model: nn.Module, optimizer: GaLoreAdamW) -> list[Tensor]:
    """Weights, and everything that the optimizer keeps."""
    state = [
        value
        for parameter in model.parameters()
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor)
    ]
    return [*(parameter.detach() for parameter in model.parameters()), *state]


def another_library(matrix: Tensor, *, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
    """An SVD as valid as torch's: other signs, and the leading pair turned as if degenerate."""
    u, s, vh = torch.linalg._stock_svd(matrix, full_matrices=full_matrices)
    turn = torch.eye(len(s))
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    return -u @ turn.mT, s, -(turn @ vh)


def _check(rank: int) -> None:
    own = half(rank)
    # `new_group` is for all ranks to call, for each of the groups.
    alone = [dist.new_group([0]), dist.new_group([1])][rank]

    wrapped = DistributedDataParallel(network())
    optimizer = optimizer_of(wrapped)
    train(wrapped, optimizer, own, STEPS)
    assert differing(held(wrapped, optimizer)) == 0
    whole = network()
    train(whole, optimizer_of(whole, alone), slice(None), STEPS)
    for ours, theirs in zip(wrapped.parameters(), whole.parameters(), strict=True):
        # Two means of four are averaged where the other takes one of eight; Adam divides by it.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    torch.linalg._stock_svd = torch.linalg.svd
    if rank == 1:
        torch.linalg.svd = another_library
    wrapped = DistributedDataParallel(network())
    optimizer = optimizer_of(wrapped)
    train(wrapped, optimizer, own, STEPS)
    assert differing(held(wrapped, optimizer)) == 0
    # The same without the exchange: what it is there for.
    apart = DistributedDataParallel(network())
    lonely = optimizer_of(apart, alone)
    train(apart, lonely, own, STEPS)
    assert differing(held(apart, lonely)) > 0
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(lonely)  # not silently without its group

    sharded = network()
    lasting = optimizer_of(sharded, alone)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(TypeError, match=r"DTensor.*under DDP, or use AdamW"):
        optimizer_of(sharded)
    # As accelerate does it: the optimizer is older than the shards.
    parameters = list(sharded.parameters())
    for group, indices in zip(lasting.param_groups, ([0, 2], [4], [1, 3, 5]), strict=True):
        group["params"] = [parameters[index] for index in indices]
    sharded(batch(0)).square().mean().backward()
    with pytest.raises(TypeError, match="DTensor"):
        lasting.step()


def test_two_ranks_hold_the_same_bases_and_weights() -> None:
    on_two_ranks(_check)
