"""Two gloo ranks that train a small network, each on its half of every batch."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn


def network() -> nn.Module:
    """Three layers of several shapes, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(step: int) -> Tensor:
    """Eight samples."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def half(rank: int) -> slice:
    """The samples of a rank."""
    return slice(4 * rank, 4 * rank + 4)


def train(model: Any, optimizer: torch.optim.Optimizer, part: slice, steps: Iterable[int]) -> None:
    """Train on a part of the batch of each step."""
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)[part]).square().mean().backward()
        optimizer.step()


def differing(tensors: list[Tensor]) -> int:
    """How many of the tensors are not, bit for bit, those of the other rank."""
    count = 0
    for tensor in tensors:
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.contiguous())
        count += not torch.equal(*both)
    return count


def on_two_ranks(check: Callable[[int], None]) -> None:
    """Run a check in two processes that know each other; it is given its rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_rank, args=(port, check), nprocs=2)


def _rank(rank: int, port: int, check: Callable[[int], None]) -> None:
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    check(rank)
    dist.destroy_process_group()
