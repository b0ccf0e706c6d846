"""Ranks, threads, autocast and functional calls."""

from __future__ import annotations

import copy
import os
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.sources.examples import Example
from tests.survival.calls import (
    Case,
    Gradients,
    Notes,
    clear,
    distance,
    leaves,
    loss_of,
    parameters,
    same,
    same_gradients,
    still,
    train,
)
from tests.survival.models import Subject
from tests.survival.reference import MARK, Reference, coefficients


def _halves(subject: Subject, rank: int | None) -> Example:
    """A batch of four, or the two of a rank."""
    example = subject.inputs(4, subject.sizes[0][1])
    example = Example(example.args, {**example.kwargs, **subject.quiet})
    if rank is None:
        return example

    def half(tensor: Tensor) -> Tensor:
        return tensor[2 * rank : 2 * rank + 2] if len(tensor) == 4 else tensor

    return example.map(half)


def _in_ranks(worker: Callable[[int, Case], None], case: Case) -> None:
    """Run a function in two processes that find each other through a file."""
    context = torch.multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(rank, worker, f"{folder}/store", case, queue))
            for rank in (0, 1)
        ]
        for process in ranks:
            process.start()
        problems = [problem for _ in ranks if (problem := queue.get())]
        for process in ranks:
            process.join()
    if problems:
        raise AssertionError(problems[0])


def _rank(rank: int, worker: Callable[..., None], store: str, case: Case, queue: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)  # torch's thread pool does not survive a fork until it is asked for
    problem = ""
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        worker(rank, case)
        dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001  told to the process that waits for it
        problem = f"rank {rank}: {type(error).__name__}: {error}"
    queue.put(problem)
    # What a rank that failed holds on to must not keep the other waiting.
    os._exit(0)


def _alone(case: Case) -> tuple[nn.Module, Gradients]:
    """A model, and the gradients that the reference has on the whole batch in one process.

    In eval mode: BatchNorm and dropout of a half are not those of the whole.
    """
    model = case.model()
    reference = case.reference(model)
    _, wanted = train(reference, _halves(case.subject, None))
    return model, wanted


def _replicated(rank: int, case: Case) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model, wanted = _alone(case)
    unused = len(wanted) < len(list(model.parameters()))
    wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
    _, found = train(model, _halves(case.subject, rank), through=wrapped)
    same_gradients(found, wanted)


def replicated(case: Case) -> Notes:
    """DistributedDataParallel on two gloo ranks has the gradients of one process."""
    _in_ranks(_replicated, case)
    return {}


def _sharded(rank: int, case: Case) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, wanted = _alone(case)
    mesh = init_device_mesh("cpu", (2,))
    for name, module in list(model.named_modules()):
        if f"{name}.".rpartition(".")[0].endswith(tuple(_mixers(case))):
            fully_shard(module, mesh=mesh)
    for stack in case.subject.stacks:
        for site in stack.sites:
            fully_shard(model.get_submodule(site), mesh=mesh)
    fully_shard(model, mesh=mesh)
    _, found = train(model, _halves(case.subject, rank))
    full = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
    same_gradients(full, wanted)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is no DTensor"
        local, whole = parameter.to_local().numel(), parameter.numel()
        assert local < whole or len(parameter) < 2, f"{name}: {local} of {whole} on one rank"
    assert set(coefficients(model)) <= set(wanted)


def _mixers(case: Case) -> list[str]:
    """Ends of the paths of the modules that own coefficients."""
    return [stack.prefix.rstrip(".") for stack in case.subject.stacks] if case.column else ["\0"]


def sharded(case: Case) -> Notes:
    """FSDP2 on two gloo ranks: real shards, the gradients of one process, mixers as groups."""
    _in_ranks(_sharded, case)
    return {}


def threads(case: Case) -> Notes:
    """Two threads at once, forward and backward, each with its own batch."""
    model = case.model()
    reference = case.reference(model)
    examples = [case.subject.example(number, quiet=True) for number in (0, 1)]
    wanted = [train(reference, example) for example in examples]
    clear(model)
    names, tensors = zip(*parameters(model).items(), strict=True)
    barrier = threading.Barrier(2)
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            torch.set_num_threads(1)
            for _ in range(5):
                barrier.wait(60)
                example = examples[number]
                outputs = list(leaves(model(*example.args, **example.kwargs)))
                found = torch.autograd.grad(loss_of(outputs), tensors, allow_unused=True)
                same(outputs, wanted[number][0])
                there = {n: g for n, g in zip(names, found, strict=True) if g is not None}
                same_gradients(there, wanted[number][1])
        except BaseException as error:  # noqa: BLE001  raised where the threads are joined
            problems.append(error)
            barrier.abort()

    workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    broken = [p for p in problems if not isinstance(p, threading.BrokenBarrierError)] or problems
    if broken:
        raise broken[0]
    return {}


def autocast(case: Case) -> Notes:
    """Under bfloat16 autocast: as close to float32 as the reference, coefficients in float32."""
    model = case.model()
    reference = case.reference(model)
    example = case.subject.example(quiet=True)
    exact = still(reference.model, example)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = still(model, example), still(reference.model, example)
    assert [t.dtype for t in found] == [t.dtype for t in wanted], "another dtype"
    for one, other, truth in zip(found, wanted, exact, strict=True):
        ours, theirs = distance(one, truth), distance(other, truth)
        assert ours <= 2 * theirs + 1e-3, f"{ours:.1e} from float32, the reference {theirs:.1e}"

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*args, **kwargs)

    _, gradient = train(model, example, through=forward)
    for name in coefficients(model):
        assert gradient[name].dtype is torch.float32, f"{name}: {gradient[name].dtype}"
    half = copy.deepcopy(model).bfloat16()
    wide = [name for name, p in coefficients(half).items() if p.dtype is not torch.float32]
    assert not wide, f"coefficients not in float32 in a bfloat16 model: {wide}"
    outputs = still(half, example.to(dtype=torch.bfloat16))
    assert all(bool(t.isfinite().all()) for t in outputs)
    return {}


def functional(case: Case) -> Notes:
    """``torch.func.functional_call`` with other tensors, and ``torch.func.grad`` through it."""
    model = case.model()
    example = case.subject.example(quiet=True)
    before = still(model, example)
    generator = torch.Generator().manual_seed(5)
    other = {
        name: p.detach()
        + (0.003 if MARK in name else 0.02) * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
    }
    reference = Reference(
        case.subject,
        case.column,
        {name: t for name, t in other.items() if MARK in name},
        case.subject.build(),
    )
    reference.model.load_state_dict(
        {name: t for name, t in other.items() if MARK not in name}, strict=False
    )

    def outputs(given: dict[str, Tensor]) -> list[Tensor]:
        return list(leaves(torch.func.functional_call(model, given, example.args, example.kwargs)))

    with torch.no_grad():
        same(outputs(other), still(reference.model, example))
    found = torch.func.grad(lambda given: loss_of(outputs(given)))(other)
    _, wanted = train(reference, example)
    same_gradients({name: found[name] for name in wanted}, wanted)
    same(still(model, example), before, 0, "the model changed:")
    return {}
