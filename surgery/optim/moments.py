"""What an optimizer remembers of a parameter, when the parameter gets other coordinates.

A method that scales a factor's columns scales the gradients to come by other numbers. Whatever an
optimizer has gathered of earlier gradients then has to be what it would have gathered of the
scaled ones: a first moment is scaled like a gradient, a second moment by the square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from surgery.errors import ModelStateError

_ADAM = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}

#: Where an ascent keeps its direction in an optimizer's state: a mean of gradients, as a moment is.
ASCENT = "ascent"

#: Optimizers that step with gradients taken uphill → the directions that become state in this step.
climbing: WeakKeyDictionary[Optimizer, dict[Tensor, Tensor]] = WeakKeyDictionary()

#: Optimizer → name in its state → the power of the gradients that it is made of.
POWERS: Mapping[type[Optimizer], Mapping[str, int]] = {
    SGD: {"momentum_buffer": 1},
    Adam: _ADAM,
    AdamW: _ADAM,
    NAdam: {**_ADAM, "mu_product": 0},
    RAdam: _ADAM,
    Adamax: {"step": 0, "exp_avg": 1, "exp_inf": 1},
    Adagrad: {"step": 0, "sum": 2},
    # Its momentum is that of steps, which are gradients over their root mean square.
    RMSprop: {"step": 0, "square_avg": 2, "grad_avg": 1, "momentum_buffer": 0},
    Muon: {"momentum_buffer": 1},
}

_REFUSED: Mapping[type[Optimizer], str] = {
    Adafactor: "its second moment is one number per row and one per column, which cannot follow "
    "a scaling of single columns",
    Adadelta: "it remembers the sizes of its steps in the coordinates they were made in",
    ASGD: "it averages the parameters themselves, and the average would mix coordinates",
    Rprop: "it has a step size per element that belongs to the coordinates it was found in",
    SparseAdam: "it takes sparse gradients, and those of adapters are dense",
}


def powers_of(optimizer: Optimizer) -> Mapping[str, int]:
    """Name in the optimizer's state → the power of the gradients it is made of.

    Raises:
        ModelStateError: it is not known how the state of this optimizer follows a scaling, or it
            cannot.
    """
    for parent in type(optimizer).__mro__:
        if parent in POWERS:
            return {**POWERS[cast("type[Optimizer]", parent)], ASCENT: 1}
        if parent in _REFUSED:
            raise _refusal(optimizer, _REFUSED[cast("type[Optimizer]", parent)])
    raise _refusal(optimizer, "it is not known what the tensors in its state are made of")


def check_state(optimizer: Optimizer, parameter: Tensor) -> None:
    """Raise if ``scale_state`` would for this parameter. Changes nothing.

    Raises:
        ModelStateError: the optimizer is not supported, or keeps something that is not known.
    """
    powers = powers_of(optimizer)
    for name, value in _state(optimizer, parameter).items():
        if isinstance(value, Tensor) and name not in powers:
            raise _refusal(optimizer, f"it keeps {name!r}, and it is not known what that is")


@torch.no_grad()
def scale_state(optimizer: Optimizer, parameter: Tensor, factor: Tensor | float) -> None:
    """Turn what is remembered of gradients into that of gradients times ``factor``, in place.

    Supported are SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, RMSprop and Muon of torch, and
    subclasses of them that keep nothing else.

    Args:
        optimizer: The optimizer of the parameter.
        parameter: The parameter. Before its first step nothing is remembered.
        factor: Broadcast against the parameter.

    Raises:
        ModelStateError: the optimizer is not supported, or keeps something that is not known.
            Nothing has changed then.
    """
    check_state(optimizer, parameter)
    powers = powers_of(optimizer)
    for name, value in _state(optimizer, parameter).items():
        if not isinstance(value, Tensor) or powers[name] == 0:
            continue
        value.mul_(factor if powers[name] == 1 else factor**2)
    direction = climbing.get(optimizer, {}).get(parameter)
    if direction is not None:
        direction.mul_(factor)


def _state(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    # It is a defaultdict: looking a parameter up would make an entry, which some optimizers take
    # for a state that is complete.
    return cast("Mapping[str, Any]", optimizer.state.get(parameter, {}))


def _refusal(optimizer: Optimizer, reason: str) -> ModelStateError:
    known = ", ".join(each.__name__ for each in POWERS)
    return ModelStateError(
        f"the state of {type(optimizer).__name__} cannot follow a change of the adapters' "
        f"coordinates: {reason}",
        hint=f"use one of {known}",
    )
