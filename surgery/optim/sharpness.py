"""Sharpness-aware minimisation: the gradient is taken where the loss is worse nearby.

    d_t = (1 - θ) d_{t-1} + θ g_t          d_0 = g_0
    ε_t = ρ d_t / (|d_t| + 1e-7)           the norm is over all parameters
    step at w_t with the gradient at w_t + ε_t

θ = 1 is SAM (arXiv 2010.01412), smaller ones are VASSO (arXiv 2309.15639), which smooths the
direction of the ascent. Each step takes two forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.errors import ConfigError, ModelStateError
from surgery.optim.moments import ASCENT as STATE
from surgery.optim.moments import climbing
from surgery.optim.rule import rules_of

_EPSILON = 1e-7


class Ascent:
    """Moves parameters to where the second gradient is taken, and back.

    ::

        loss(model).backward()
        with ascent.climbed():
            loss(model).backward()
        optimizer.step()

    d is part of the optimizer's own state, so that saving, loading and sharding that is enough. It
    changes when the optimizer steps: a step that is left out leaves no trace. A parameter without
    a gradient in some step counts as one whose gradient is zero.

    Rules of adapters (``StepRule``) see the factors at w and the gradient at w + ε. Those that can
    work with that are attached after it. One that changes the coordinates of the factors
    (RefLoRA-S) changes those of d as well, as those of moments.

    Args:
        optimizer: Of the parameters.
        rho: Length of the ascent, ρ.
        theta: Weight of the new gradient, θ.

    Raises:
        ConfigError: ρ is not positive, or θ not in (0, 1].
        ModelStateError: the optimizer climbs already, or has rules already.
    """

    def __init__(self, optimizer: Optimizer, *, rho: float, theta: float = 1.0) -> None:
        if not rho > 0:
            raise ConfigError(f"rho is {rho}, expected a positive length", hint="as in 0.05")
        if not 0 < theta <= 1:
            raise ConfigError(f"theta is {theta}, expected a weight in (0, 1]", hint="as in 0.9")
        _check_first(optimizer)
        self._optimizer = optimizer
        self._rho = rho
        self._theta = theta
        # What changes the coordinates of a parameter finds it there.
        self._next: dict[Tensor, Tensor] = climbing.setdefault(optimizer, {})
        cast("Any", optimizer).register_step_post_hook(self._stepped)

    @contextmanager
    def climbed(self) -> Generator[None]:
        """Parameters are at w + ε inside, without gradients; afterwards at w, in every bit.

        What gradients are made inside stay. Where the first gradient is not finite, neither is
        what comes out.
        """
        directions = self._directions()
        norm = _norm([*directions.values()])
        # On the device: a norm that is not finite must not get into d, and nothing waits for it.
        finite = torch.isfinite(norm)
        self._next.clear()
        if self._theta < 1:
            for parameter, direction in directions.items():
                last = self._last(parameter, direction)
                self._next[parameter] = torch.where(finite, direction, last)
        scale = self._rho / (norm + _EPSILON)
        places = {p: p.detach().clone() for p in directions}
        with torch.no_grad():
            for parameter, direction in directions.items():
                parameter.add_(direction * scale.to(direction.dtype))
        self._optimizer.zero_grad()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, place in places.items():
                    parameter.copy_(place)

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        """Those of this step, in the parameters' order."""
        found: dict[nn.Parameter, Tensor] = {}
        for parameter in self._parameters():
            gradient: Tensor | None = parameter.grad
            last: Tensor | None = self._optimizer.state[parameter].get(STATE)
            if gradient is None and last is None:
                continue
            if last is None:
                found[parameter] = cast("Tensor", gradient).detach().clone()
            elif gradient is None:
                found[parameter] = (1 - self._theta) * last
            else:
                found[parameter] = torch.lerp(last, gradient.detach(), self._theta)
        return found

    def _last(self, parameter: nn.Parameter, like: Tensor) -> Tensor:
        last: Tensor | None = self._optimizer.state[parameter].get(STATE)
        return torch.zeros_like(like) if last is None else last

    def _stepped(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Keep d. Not before: an empty state is what tells an optimizer to make its own.

        A step without an ascent is what torch's sharded checkpoints make of a new optimizer, to
        learn what its state holds: d is then there to be loaded into. Where a rule has made a step
        void no parameter has a gradient.
        """
        void = all(parameter.grad is None for parameter in self._parameters())
        for parameter in self._parameters() if self._theta < 1 and not void else ():
            state = optimizer.state[parameter]
            if state or parameter.grad is not None:
                found = self._next.get(parameter, state.get(STATE))
                state[STATE] = torch.zeros_like(parameter) if found is None else found
        self._next.clear()

    def _parameters(self) -> list[nn.Parameter]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]


def _check_first(optimizer: Optimizer) -> None:
    if optimizer in climbing:
        raise ModelStateError(
            "this optimizer takes its gradients uphill already",
            hint="build one Ascent for an optimizer",
        )
    rules = rules_of(optimizer)
    if rules:
        raise ModelStateError(
            f"{type(rules[0]).__name__} is around the steps of this optimizer already, and would "
            "void or change a step without the ascent's knowing",
            hint="build the Ascent first, and call surgery.adapters.prepare after it",
        )


def _norm(tensors: list[Tensor]) -> Tensor:
    """Norm over all tensors, and over all ranks where they are sharded."""
    from torch.distributed.tensor import DTensor

    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
