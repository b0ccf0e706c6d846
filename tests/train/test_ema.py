"""The average of weights: against the formula, exact to save and to put back, and sharded."""

from __future__ import annotations

import copy
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import surgery
from surgery.errors import CheckpointError
from surgery.train.ema import Ema

DECAY = 0.8


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def step(model: nn.Module, ema: Ema, seed: int) -> None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype))
    ema.update()


def test_average_by_the_formula() -> None:
    model = network()
    ema = Ema(model, DECAY)
    expected = {name: value.double() for name, value in weights(model).items()}
    for seed in range(5):
        step(model, ema, seed)
        for name, value in weights(model).items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * value.double()
    found = ema.state_dict()
    assert found["updates"] == 5
    assert found["average"].keys() == expected.keys()
    for name, value in found["average"].items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_it_starts_at_the_weights() -> None:
    model = network()
    average = Ema(model, DECAY).state_dict()["average"]
    for name, parameter in model.named_parameters():
        assert torch.equal(average[name], parameter)
        assert average[name].data_ptr() != parameter.data_ptr()


def test_applied_and_put_back_bit_for_bit() -> None:
    model = network().eval()
    ema = Ema(model, DECAY)
    for seed in range(3):
        step(model, ema, seed)
    own, objects = weights(model), [id(each) for each in model.parameters()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def fail() -> None:
        for name, value in weights(model).items():
            assert torch.equal(value, ema.state_dict()["average"][name])
            assert not torch.equal(value, own[name])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ema.applied():
        fail()
    assert all(torch.equal(value, own[name]) for name, value in weights(model).items())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert [id(each) for each in model.parameters()] == objects


def test_bfloat16_weights_have_a_float32_average() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = Ema(model, 0.9999)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(10):
        ema.update()
    average = ema.state_dict()["average"]["weight"]
    assert average.dtype == torch.float32
    # 1 + (1 - 0.9999 ** 10): in bfloat16 it would still be 1.
    torch.testing.assert_close(average, torch.full((4, 4), 2 - 0.9999**10), rtol=1e-6, atol=0)
    with ema.applied():
        assert model.weight.dtype == torch.bfloat16


def test_frozen_and_tied_parameters() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    model["second"].weight = model["first"].weight
    model["first"].bias.requires_grad_(requires_grad=False)
    average = Ema(model, DECAY).state_dict()["average"]
    assert set(average) == {"first.weight", "second.bias"}


def test_a_model_with_nothing_to_average() -> None:
    model = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    ema = Ema(model, DECAY)
    ema.update()
    with ema.applied():
        assert ema.state_dict()["average"] == {}


def test_coefficients_of_a_rewired_model_are_averaged() -> None:
    config = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 16}
    model = surgery.load(
        "transformers:LlamaForCausalLM",
        config=config | {"vocab_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2},
    )
    surgery.apply(model, surgery.Rule(surgery.Shortcuts()))
    ema = Ema(model, DECAY)
    (before,) = surgery.shortcuts(model).values()
    step(model, ema, 0)
    (after,) = surgery.shortcuts(model).values()
    with ema.applied():
        (average,) = surgery.shortcuts(model).values()
    assert not torch.equal(average, before)
    assert not torch.equal(average, after)
    (again,) = surgery.shortcuts(model).values()
    assert torch.equal(again, after)


def test_saved_and_loaded_bit_for_bit() -> None:
    model, other = network(), network()
    ema = Ema(model, DECAY)
    for seed in range(3):
        step(model, ema, seed)
    saved = copy.deepcopy(ema.state_dict())
    step(model, ema, 3)
    other.load_state_dict(model.state_dict())
    again = Ema(other, DECAY)
    again.load_state_dict(saved)
    again.update()
    assert again.updates == 4
    for name, value in ema.state_dict()["average"].items():
        assert torch.equal(value, again.state_dict()["average"][name])


def _without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return state | {"average": {k: v for k, v in state["average"].items() if k != name}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state | {"decay": 0.5}, "a decay of 0.5, and the configuration has 0.8"),
        (lambda state: _without(state, "0.bias"), "1 parameters are missing.*such as 0.bias"),
        (
            lambda state: state | {"average": state["average"] | {"new": torch.zeros(1)}},
            "1 unknown.*such as new",
        ),
        (
            lambda state: state | {"average": state["average"] | {"3.bias": torch.zeros(4)}},
            "1 of another shape.*such as 3.bias",
        ),
    ],
)
def test_state_of_another_model_is_refused(change: Any, said: str) -> None:
    ema = Ema(network(), DECAY)
    before = copy.deepcopy(ema.state_dict()["average"])
    with pytest.raises(CheckpointError, match=said):
        ema.load_state_dict(change(copy.deepcopy(ema.state_dict())))
    assert all(torch.equal(v, before[k]) for k, v in ema.state_dict()["average"].items())


def _stack() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _rank(rank: int, port: int) -> None:
    """One of two gloo ranks: a sharded model has the average that a whole one has."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    whole, sharded = _stack(), _stack()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    pairs: list[tuple[Any, Ema, Any]] = [
        (model, Ema(model, DECAY), torch.optim.AdamW(model.parameters(), lr=0.05))
        for model in (whole, sharded)
    ]
    for model, ema, optimizer in pairs:
        for _ in range(4):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
    averages = [ema.state_dict()["average"] for _, ema, _ in pairs]
    for name, value in averages[1].items():
        assert isinstance(value, DTensor)
        torch.testing.assert_close(value.full_tensor(), averages[0][name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        # The forward before leaves gathered weights behind, which must not be used again.
        own = sharded(x)
        with pairs[0][1].applied(), pairs[1][1].applied():
            torch.testing.assert_close(sharded(x), whole(x), rtol=1e-5, atol=1e-6)
            assert not torch.allclose(sharded(x), own, atol=1e-2)
        assert torch.equal(sharded(x), own)
    # Together: gloo aborts a process whose peer went away first.
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")  # gloo and fork say what they think of CPUs
def test_fsdp2() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, args=(port,), nprocs=2)
