"""The optimizer of a run and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from surgery.errors import CheckpointError, ConfigError, ModelStateError
from surgery.passes.streams import parameter_groups

if TYPE_CHECKING:
    from surgery.train.config import AdamWConfig, GaloreConfig, ScheduleConfig

Kind = Literal["cosine", "linear", "constant"]

_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Types of devices that torch has a fused AdamW for."""


def build_optimizer(model: nn.Module, settings: AdamWConfig | GaloreConfig) -> Optimizer:
    """The optimizer of a run, over the trainable parameters of a model.

    Weight decay is for all of them but the coefficients of shortcuts; see
    ``surgery.parameter_groups``. ``adamw`` is torch's, fused where torch has that for the devices
    the parameters are on: one pass over the memory in place of a dozen.

    Args:
        model: Rewired or not, before it is wrapped for several processes.
        settings: ``config.optim``.

    Raises:
        ConfigError: there is no optimizer of that name.
        ModelStateError: nothing in the model is trainable, or a parameter has no data yet.
    """
    groups = parameter_groups(model, weight_decay=settings.weight_decay)
    _check_trainable(groups)
    if settings.name != "adamw":
        raise ConfigError(f"there is no optimizer {settings.name!r}", hint="use adamw")
    return AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=_fusable(groups)
    )


@dataclass(frozen=True)
class Curve:
    """Step → factor of the learning rate.

    It rises from 0 in a line, ``s / warmup``, and from there to the end, with
    ``t = (s - warmup) / (steps - warmup)``:

    - ``cosine``: ``final + (1 - final) · (1 + cos πt) / 2``
    - ``linear``: ``final + (1 - final) · (1 - t)``
    - ``constant``: 1

    So it is in the code of GaLore (arXiv 2403.03507) and ANCRe (arXiv 2602.09009): the first step
    of a warm-up changes no weight, and ``final`` would be the factor of the step after the last.

    Args:
        kind: ``cosine``, ``linear`` or ``constant``.
        steps: Optimizer steps of the run.
        warmup: How many of them the rise takes; 0 for none.
        final: What is left of the learning rate at the end; ``constant`` has no use for it.
    """

    kind: Kind
    steps: int
    warmup: int
    final: float

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= self.steps:
            raise ConfigError(
                f"a warm-up of {self.warmup} steps does not fit a run of {self.steps}",
                hint="lower schedule.warmup or raise train.steps",
            )
        if not 0 <= self.final <= 1:
            raise ConfigError(
                f"schedule.final is a fraction of the learning rate, from 0 to 1; got {self.final}"
            )

    def __call__(self, step: int) -> float:
        """The factor for optimizer step ``step``, counted from 0; that of the end beyond it."""
        if step < self.warmup:
            return step / self.warmup
        if self.kind == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.final + (1 - self.final) * left


class Schedule(LambdaLR):
    """Sets the learning rate of every group to its own times a curve. One ``step()`` a step.

    Its state holds the curve. A run that goes on along another one would jump in its learning
    rate, so loading such a state is refused.

    Args:
        optimizer: Whose groups it drives.
        curve: Step → factor.
    """

    def __init__(self, optimizer: Optimizer, curve: Curve) -> None:
        super().__init__(optimizer, curve)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a schedule of the same curve stopped.

        Raises:
            CheckpointError: the state is that of another curve.
        """
        ours = vars(self.lr_lambdas[0])
        saved = cast("Mapping[str, object]", state_dict["lr_lambdas"][0])
        changed = [key for key in ours if saved[key] != ours[key]]
        if changed:
            told = ", ".join(f"{key} {saved[key]} → {ours[key]}" for key in changed)
            raise CheckpointError(
                f"the checkpoint was trained along another schedule: {told}",
                hint="resume with the saved run's schedule and train.steps, or start a new run "
                "from the saved weights",
            )
        super().load_state_dict(state_dict)


def build_schedule(optimizer: Optimizer, settings: ScheduleConfig, steps: int) -> Schedule:
    """The schedule of the learning rate of a run.

    Args:
        optimizer: What ``build_optimizer`` gave.
        settings: ``config.schedule``.
        steps: Optimizer steps of the whole run, also of one that is resumed.

    Raises:
        ConfigError: the warm-up is longer than the run, or ``final`` is not from 0 to 1.
    """
    curve = Curve(settings.kind, steps, settings.warmup, settings.final)
    return Schedule(optimizer, curve)


def _check_trainable(groups: Sequence[Mapping[str, Any]]) -> None:
    parameters = _parameters(groups)
    if not parameters:
        raise ModelStateError(
            "no parameter of the model requires a gradient, so there is nothing to train",
            hint="model.requires_grad_(True), or a rule that leaves something trainable",
        )
    if any(parameter.is_meta for parameter in parameters):
        raise ModelStateError(
            "parameters are on the meta device: they have a shape and no data",
            hint='load the model with device="cpu" or "cuda"',
        )


def _fusable(groups: Sequence[Mapping[str, Any]]) -> bool:
    return all(p.device.type in _FUSED and p.is_floating_point() for p in _parameters(groups))


def _parameters(groups: Sequence[Mapping[str, Any]]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]
