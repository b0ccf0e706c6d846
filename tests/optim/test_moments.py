"""What an optimizer remembers of gradients, turned into that of scaled gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from surgery.errors import ModelStateError
from surgery.optim import GaLoreAdamW
from surgery.optim.moments import POWERS, check_state, powers_of, scale_state

Make = Callable[[list[Tensor]], Optimizer]

SUPPORTED: dict[str, Make] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "sgd, momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.1),
    "adam, amsgrad": functools.partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.1),
    "adamw, fused": functools.partial(torch.optim.AdamW, lr=0.1, fused=True),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.1),
    "radam": functools.partial(torch.optim.RAdam, lr=0.1),
    "adamax": functools.partial(torch.optim.Adamax, lr=0.1, eps=1e-30),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.1, eps=1e-30),
    "rmsprop, all": functools.partial(
        torch.optim.RMSprop, lr=0.1, eps=1e-30, momentum=0.9, centered=True
    ),
    "muon": functools.partial(torch.optim.Muon, lr=0.1),
}

REFUSED: dict[str, tuple[Make, str]] = {
    "adadelta": (torch.optim.Adadelta, "sizes of its steps"),
    "adafactor": (torch.optim.Adafactor, "one number per row"),
    "asgd": (torch.optim.ASGD, "averages the parameters"),
    "rprop": (torch.optim.Rprop, "a step size per element"),
    "sparse adam": (torch.optim.SparseAdam, "sparse gradients"),
    "lbfgs": (torch.optim.LBFGS, "not known what the tensors in its state are made of"),
    "galore": (GaLoreAdamW, "not known"),
}


def trained(make: Make, factor: Tensor | float) -> tuple[Optimizer, Tensor]:
    """After three steps with gradients times a factor."""
    draw = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.float64))
    optimizer = make([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(5, 3, generator=draw, dtype=torch.float64) * factor
        optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize("make", SUPPORTED.values(), ids=SUPPORTED)
def test_the_state_is_that_of_the_scaled_gradients(make: Make):
    factor = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64)
    scaled, parameter = trained(make, 1.0)
    scale_state(scaled, parameter, factor)
    expected, other = trained(make, factor)
    assert scaled.state[parameter].keys() == expected.state[other].keys()
    for name, value in expected.state[other].items():
        # torch keeps the moments of a fused optimizer in the parameter's float64 too.
        torch.testing.assert_close(scaled.state[parameter][name], value, rtol=1e-12, atol=0)


def test_every_supported_optimizer_is_tested():
    assert {type(make([torch.nn.Parameter(torch.ones(2, 2))])) for make in SUPPORTED.values()} == (
        POWERS.keys()
    )


@pytest.mark.parametrize("make", SUPPORTED.values(), ids=SUPPORTED)
def test_before_the_first_step_there_is_nothing_to_scale(make: Make):
    parameter = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = make([parameter])
    before = optimizer.state_dict()
    scale_state(optimizer, parameter, 2.0)
    # Looking for its state must not have made an empty one.
    assert optimizer.state_dict() == before


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_follow_is_refused(make: Make, reason: str):
    with pytest.raises(ModelStateError, match=reason) as caught:
        powers_of(make([torch.nn.Parameter(torch.ones(2, 2))]))
    assert "AdamW" in caught.value.hint


def test_a_subclass_is_taken_until_it_keeps_something_of_its_own():
    class Own(torch.optim.AdamW):
        pass

    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Own([parameter])
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    check_state(optimizer, parameter)
    optimizer.state[parameter]["slow"] = torch.ones(2, 2)
    before = optimizer.state[parameter]["exp_avg"].clone()
    with pytest.raises(ModelStateError, match="it keeps 'slow'"):
        scale_state(optimizer, parameter, 2.0)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], before)
