"""Step rules on two gloo ranks: under DDP and FSDP2 the run of one process."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import surgery
from surgery import LowRank, Rule, Type, adapters
from tests.optim.two_ranks import batch, differing, half, network, on_two_ranks, train

STEPS = 4
METHODS = {
    "reflora": {"warmup": 1, "interval": 1},
    "reflora-s": {"warmup": 1, "interval": 1},
    "lora-pro": {},
    "altlora": {},
    "nora-plus": {},
}


def rewritten(method: str) -> nn.Module:
    """A model with adapters none of whose factors is zero. An odd rank is sharded unevenly."""
    model = network()
    options = LowRank(method=method, rank=3, alpha=6, options=METHODS[method])
    surgery.apply(model, Rule(options, where=Type("Linear")))
    with torch.no_grad():
        for parameter in adapters.parameters(model):
            parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A large eps: Adam would divide rounding by rounding where gradients nearly vanish.
    return torch.optim.AdamW(trained, lr=0.02, eps=1e-2)


def whole(model: nn.Module) -> list[Tensor]:
    """Trained tensors, gathered."""
    trained = [each.detach() for each in model.parameters() if each.requires_grad]
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in trained]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    # Two means of four are averaged where the other takes one of eight: rounding of float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_ddp(method: str, own: slice, expected: list[Tensor]) -> None:
    wrapped = DistributedDataParallel(rewritten(method))
    optimizer = optimizer_of(wrapped)
    (rule,) = adapters.prepare(wrapped, optimizer).rules
    train(wrapped, optimizer, own, range(STEPS))
    assert differing(whole(wrapped)) == 0
    assert rule.steps == STEPS
    close(whole(wrapped), expected)


def check_fsdp(method: str, own: slice, expected: list[Tensor], rank: int) -> None:
    sharded = fully_shard(rewritten(method), mesh=init_device_mesh("cpu", (2,)))
    optimizer = optimizer_of(sharded)
    prepared = adapters.prepare(sharded, optimizer)
    train(sharded, optimizer, own, range(2))
    check_void(sharded, optimizer, own, rank)
    saved = copy.deepcopy(get_optimizer_state_dict(sharded, optimizer))
    prepared.detach()

    resumed = optimizer_of(sharded)
    (rule,) = adapters.prepare(sharded, resumed).rules
    set_optimizer_state_dict(sharded, resumed, saved)
    assert rule.steps == 2
    train(sharded, resumed, own, range(2, STEPS))
    close(whole(sharded), expected)


def check_void(model: Any, optimizer: torch.optim.Optimizer, own: slice, rank: int) -> None:
    """What only one rank sees makes the step void on both."""
    before = whole(model)
    optimizer.zero_grad()
    model(batch(9)[own]).square().mean().backward()
    if rank == 1:
        gradient = next(each.grad for each in model.parameters() if each.grad is not None)
        gradient.to_local().fill_(float("nan"))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole(model), before, strict=True))


def _check(rank: int) -> None:
    logging.getLogger("surgery").setLevel(logging.ERROR)
    own = half(rank)
    for method in METHODS:
        alone = rewritten(method)
        optimizer = optimizer_of(alone)
        adapters.prepare(alone, optimizer)
        train(alone, optimizer, slice(None), range(STEPS))
        check_ddp(method, own, whole(alone))
        check_fsdp(method, own, whole(alone), rank)


def test_two_ranks_train_as_one_process_does() -> None:
    on_two_ranks(_check)
