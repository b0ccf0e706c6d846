"""An exponential moving average of a model's weights (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from surgery.errors import CheckpointError


class Ema:
    """Averages of the trained parameters: ``a <- decay * a + (1 - decay) * w`` after each step.

    They start as the weights that the model has now, and are kept in float32 at least: at a decay
    of 0.9999 an average in bfloat16 would not move at all. Tied parameters have one average. A
    parameter sharded by FSDP2 has an average that is sharded alike. Buffers are not averaged:
    whatever weights are in place, the model has its own ones.

    Args:
        model: The model once it is prepared: moved, sharded, not compiled anew afterwards.
        decay: In (0, 1).

    Attributes:
        updates: How many steps have been averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._blend: Any = get_ema_multi_avg_fn(decay)
        # The parameters themselves, not their names: FSDP2 puts others in their place for the
        # time of a forward, and it is the sharded ones that the optimizer changes.
        self._sharded = [each for each in model.modules() if isinstance(each, FSDPModule)]
        self._gathered_away()
        self._weights = {
            name: parameter for name, parameter in model.named_parameters() if _averaged(parameter)
        }
        self._average = {name: _wide(each) for name, each in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        self.updates += 1
        if not self._average:
            return
        for averages, weights in self._by_dtype():
            self._blend(averages, weights, self.updates)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Give the model the averages for weights while it is open, and then its own ones back."""
        kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._set(self._average)
        try:
            yield
        finally:
            self._set(kept)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes; the tensors are the averages themselves, no copies."""
        return {"decay": self.decay, "updates": self.updates, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average.

        Raises:
            CheckpointError: it has another decay, or is of other parameters.
        """
        if state["decay"] != self.decay:
            raise CheckpointError(
                f"the checkpoint averages with a decay of {state['decay']}, and the configuration "
                f"has {self.decay}",
                hint="resume with the configuration that the run was started with",
            )
        saved = cast("Mapping[str, Tensor]", state["average"])
        _check(saved, self._average)
        for name, average in self._average.items():
            average.copy_(saved[name])
        self.updates = int(state["updates"])

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        self._gathered_away()
        for name, weight in self._weights.items():
            weight.copy_(values[name])

    def _gathered_away(self) -> None:
        """Free what FSDP2 has gathered: a forward after a change must gather anew."""
        for module in self._sharded:
            module.reshard()

    def _by_dtype(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Averages and weights in lists of one dtype, as foreach kernels want them."""
        groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        for name, average in self._average.items():
            weight = self._weights[name].detach().to(average.dtype)
            averages, weights = groups.setdefault((average.dtype, average.device), ([], []))
            averages.append(average)
            weights.append(weight)
        return list(groups.values())


def _averaged(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.is_floating_point()


def _wide(weight: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype, copy=True)


def _check(saved: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
    unknown, missing = sorted(saved.keys() - mine.keys()), sorted(mine.keys() - saved.keys())
    other = [name for name in saved.keys() & mine.keys() if saved[name].shape != mine[name].shape]
    if not (unknown or missing or other):
        return
    raise CheckpointError(
        f"the checkpoint's average is of another model: {len(missing)} parameters are missing, "
        f"{len(unknown)} unknown, {len(other)} of another shape, such as "
        f"{(missing + unknown + sorted(other))[0]}",
        hint="resume with the configuration that the run was started with",
    )
