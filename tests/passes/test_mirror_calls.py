"""Duals under checkpointing, the compiler, threads, torch.func, autocast and wrappers."""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import Mirror, Rule, mirrors
from surgery import Path as At
from surgery.errors import ModelStateError

SEPARATE, COUPLED = "legendre", "block_iaf"
# The compiler traces a map that couples parameters once for each of them.
FEW = At("blocks.{0,1}.norm")
BOTH = pytest.mark.parametrize("map", [SEPARATE, COUPLED])


class Block(nn.Module):
    """A residual branch, with a vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line = nn.LayerNorm(6), nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.line(self.norm(x)))


class Net(nn.Module):
    """Blocks that can be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def net(map: str, *, scale: float = 0.1, without_norm: bool = False, **rule: Any) -> Any:  # noqa: A002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double()
        for block in model.blocks if without_norm else ():
            block.norm = nn.Identity()
        surgery.apply(model, Rule(Mirror(map=map), **rule))
        with torch.no_grad():
            for each in mirrors.attached(model):
                for name in each.map_parameters:
                    parameter = model.get_parameter(name)
                    parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


def inputs(count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        # Sums in another order.
        torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-12, msg=name)


def trained(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    """Gradients of several forwards before one backward."""
    model.zero_grad()
    sum(model(x).square().sum() for x in batches).backward()
    found = gradients(model)
    model.zero_grad()
    return found


# Gradient checkpointing.


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("batches", [1, 2])
def test_checkpointing(map: str, reentrant: bool, batches: int) -> None:  # noqa: A002
    model = net(map)
    given = [inputs(n + 2) for n in range(batches)]
    plain = trained(model, *given)
    assert len(plain) == sum(1 for _ in model.parameters())
    model.reentrant = reentrant
    assert_same(trained(model, *given), plain)


@BOTH
def test_a_checkpointed_part_called_by_itself(map: str) -> None:  # noqa: A002
    """No forward of the whole model runs, so nothing is remembered across the parts."""
    model, x = net(map), inputs()
    model(x).square().sum().backward()
    plain = gradients(model)
    model.zero_grad()
    y = x
    for block in model.blocks:
        y = checkpoint(block, y, use_reentrant=False)
    y.square().sum().backward()
    assert_same(gradients(model), plain)


# The compiler.


@BOTH
def test_compiled(map: str) -> None:  # noqa: A002
    torch.compiler.reset()
    model, x = net(map, where=FEW), inputs()
    expected, plain = model(x), trained(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    assert_same(trained(compiled, x), {f"_orig_mod.{name}": g for name, g in plain.items()})
    with mirrors.unmapped(model):
        raw = model(x)
        torch.testing.assert_close(compiled(x), raw, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


@BOTH
def test_compiled_with_checkpointing(map: str) -> None:  # noqa: A002
    torch.compiler.reset()
    model, x = net(map, where=FEW), inputs()
    plain = trained(model, x)
    model.reentrant = False
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(trained(compiled, x), {f"_orig_mod.{name}": g for name, g in plain.items()})
    torch.compiler.reset()


@BOTH
def test_torch_export(map: str) -> None:  # noqa: A002
    model, x = net(map, where=FEW).eval(), inputs().detach()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-12, atol=1e-12)


# Threads.


@BOTH
def test_forwards_in_threads(map: str) -> None:  # noqa: A002
    model = net(map)
    batches = [inputs(n + 1) for n in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
        with mirrors.unmapped(model):
            raw = [model(x) for x in batches]
    wrong: list[int] = []

    def work(number: int) -> None:
        wanted = raw if number % 2 else expected
        for _ in range(10):
            with torch.no_grad():
                if number % 2:
                    with mirrors.unmapped(model):
                        found = model(batches[number])
                else:
                    found = model(batches[number])
            if not torch.equal(found, wanted[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@BOTH
def test_a_map_put_in_and_taken_out_while_forwards_run(map: str) -> None:  # noqa: A002
    """A map that starts as the identity changes no bit at any moment."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Net(), inputs().float().detach()
    with torch.no_grad():
        expected = model(x)
    stop, errors = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            with torch.no_grad():
                try:
                    if not torch.equal(model(x), expected):
                        errors.append("differs")
                except Exception as error:  # noqa: BLE001 - it is looked at below
                    errors.append(repr(error))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            surgery.apply(model, Rule(Mirror(map=map)))
            surgery.undo(model)
    finally:
        stop.set()
        worker.join()
    assert not errors


# Transforms.


@BOTH
def test_a_step_of_mirror_descent_by_hand(map: str) -> None:  # noqa: A002
    """The gradient is taken by the mapped values and applied to the duals, without the Jacobian."""
    model, x = net(map), inputs().detach()
    z = {name: p.detach().clone() for name, p in model.named_parameters()}
    duals = [name for each in mirrors.attached(model) for name in each.parameters]

    def loss(phi: dict[str, Tensor]) -> Tensor:
        with mirrors.unmapped(model):
            return functional_call(model, phi, (x,)).square().sum()

    phi = mirrors.primal(model, z)
    steps = grad(loss)(phi)
    stepped = {**z, **{name: z[name] - 0.1 * steps[name] for name in duals}}
    after = loss(mirrors.primal(model, stepped))
    # The same by autograd, on a plain model that has the mapped values.
    plain = Net().double()
    plain.load_state_dict({name: phi[name] for name, _ in plain.named_parameters()})
    plain(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(steps[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(after, loss(phi))
    # Mapped in the forward itself: the same number.
    torch.testing.assert_close(
        functional_call(model, stepped, (x,)).square().sum(), after, rtol=1e-10, atol=1e-12
    )


@BOTH
def test_tasks_side_by_side(map: str) -> None:  # noqa: A002
    # torch 2.15 itself differentiates a layer norm wrongly twice under vmap.
    model = net(map, without_norm=True)
    x = torch.stack([inputs(4).detach(), inputs(5).detach()[1:]])
    z = {n: p.detach() for n, p in model.named_parameters()}
    duals = [name for each in mirrors.attached(model) for name in each.parameters]

    def loss(phi: dict[str, Tensor], x: Tensor) -> Tensor:
        with mirrors.unmapped(model):
            return functional_call(model, phi, (x,)).square().sum()

    def adapted(z: dict[str, Tensor], x: Tensor) -> Tensor:
        for _ in range(2):
            steps = grad(loss)(mirrors.primal(model, z), x)
            z = {**z, **{name: z[name] - 0.01 * steps[name] for name in duals}}
        return loss(mirrors.primal(model, z), x)

    meta = grad(lambda z: vmap(adapted, (None, 0))(z, x).sum())(z)
    alone = [grad(adapted)(z, each) for each in x]
    assert set(meta) == set(z)
    for name in z:
        expected = alone[0][name] + alone[1][name]
        torch.testing.assert_close(meta[name], expected, rtol=1e-8, atol=1e-10, msg=name)
    assert all(meta[name].any() for name in duals)


# Precision.


@BOTH
def test_autocast(map: str) -> None:  # noqa: A002
    """The map itself is computed in its own dtype; what the layers do is theirs to say."""
    model, x = net(map).float(), inputs().float()
    values = mirrors.primal(model, dict(model.named_parameters()))
    plain = Net()
    plain.load_state_dict({name: values[name] for name, _ in plain.named_parameters()})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))


# Wrappers.


def test_ddp_and_fsdp() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, args=(port,), nprocs=2)


def _rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    halves = inputs(4).detach().split(2)
    for name in (SEPARATE, COUPLED):
        model = net(name)
        model(torch.cat(halves)).square().mean().backward()
        expected = gradients(model)
        for wrapped in _wrapped(model, name):
            wrapped(halves[rank]).square().mean().backward()
            found = {n.removeprefix("module."): g for n, g in gradients(wrapped).items()}
            assert_same(found, expected)
    apart = net(COUPLED)
    for block in apart.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ModelStateError, match="needs its parameters whole"):
        fully_shard(apart, mesh=init_device_mesh("cpu", (2,)))(halves[rank])
    dist.destroy_process_group()


def _wrapped(model: nn.Module, name: str) -> Iterator[Any]:
    model.zero_grad()
    yield DistributedDataParallel(copy.deepcopy(model))
    mesh = init_device_mesh("cpu", (2,))
    if name == SEPARATE:
        blocks: Any = copy.deepcopy(model)
        for block in blocks.blocks:
            fully_shard(block, mesh=mesh)
        yield fully_shard(blocks, mesh=mesh)
    yield fully_shard(copy.deepcopy(model), mesh=mesh)
