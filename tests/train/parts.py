"""Parts of runs in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

PATIENCE = 300
"""Seconds until something that never happens is taken for a hang; a busy machine is slow."""

context = multiprocessing.get_context("forkserver")
# What every run imports sooner or later: once here is cheaper than in each of its processes.
context.set_forkserver_preload(
    [
        "tests.train.parts",
        "accelerate",
        "peft",
        "pytest",
        "ruamel.yaml",
        "sklearn.datasets",
        "surgery.train.data.digits",
        "surgery.train.finetune.run",
        "surgery.train.run",
        "torch._dynamo",
        "torchvision.transforms.v2",
        "transformers.models.bert.modeling_bert",
    ]
)

Process = Any


def start(work: Callable[..., None], *arguments: Any) -> Process:
    """Run ``work`` in a process."""
    process = context.Process(target=_work, args=(work, arguments))
    process.start()
    return process


def start_ranks(count: int, work: Callable[..., None], *arguments: Any) -> list[Process]:
    """Run ``work`` in several processes that a launcher would have started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    processes: list[Process] = []
    for rank in range(count):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        launched = {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in own.items()}}
        processes.append(context.Process(target=_ranked, args=(launched, work, arguments)))
        processes[-1].start()
    return processes


def finish(processes: Sequence[Process]) -> list[int]:
    """Exit codes of processes, which end by themselves."""
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, f"{len(hanging)} processes hang"
    return [process.exitcode for process in processes]


def until(condition: Callable[[], bool], process: Process) -> None:
    """Wait for a condition, or for the end of a process."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.002)


def _ranked(launched: dict[str, str], work: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.environ.update(launched)
    _work(work, arguments)
    from surgery.train import engine

    engine.leave()


def _work(work: Callable[..., None], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    work(*arguments)
