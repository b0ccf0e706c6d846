"""Adapted models wrapped and sharded afterwards: two gloo ranks give what one process gives."""

from __future__ import annotations

import copy
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import surgery
from surgery import LowRank, Rule, adapters
from tests.passes.layers import Experts


class Block(nn.Module):
    """A linear layer, then experts that are adapted through their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.linear(x))


def adapted(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    surgery.apply(model, Rule(LowRank(method=method, rank=2)))
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name.removeprefix("module."): grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in found.items()
    }


def _rank(rank: int, port: int) -> None:
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # One method for each way of computing the output.
    for method in ("lora", "dora", "pissa", "sorsa"):
        _compare(method)
    dist.destroy_process_group()


def _compare(method: str) -> None:
    reference = adapted(method)
    x = torch.randn(4, 6)
    expected = reference(x)
    expected.square().sum().backward()
    wanted = gradients(reference)
    assert set(wanted) == {n for n, p in reference.named_parameters() if p.requires_grad}

    sharded = adapted(method)
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded:  # type: ignore[attr-defined]
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    replicated: Any = DistributedDataParallel(copy.deepcopy(adapted(method)))
    for wrapped in (sharded, replicated):
        output = wrapped(x)
        output.square().sum().backward()
        # Ranks compute alike and average: the same sums in another order.
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        found = gradients(wrapped)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")  # gloo and fork say what they think of CPUs
def test_fsdp2_and_ddp() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, args=(port,), nprocs=2)
