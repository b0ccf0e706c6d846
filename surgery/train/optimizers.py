"""The optimizer of a run and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from surgery.errors import CheckpointError, ConfigError, ModelStateError, NoMatch
from surgery.optim import GaLoreAdamW
from surgery.passes.streams import parameter_groups
from surgery.select import Match, ModelMap, Site, select

if TYPE_CHECKING:
    from surgery.rules import Where
    from surgery.train.config import AdamWConfig, GaloreConfig, ScheduleConfig

Kind = Literal["cosine", "linear", "constant"]

_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Types of devices that torch has a fused AdamW for."""


def build_optimizer(
    model: nn.Module,
    settings: AdamWConfig | GaloreConfig,
    groups: Sequence[dict[str, Any]] | None = None,
) -> Optimizer:
    """The optimizer of a run, over the trainable parameters of a model.

    Weight decay is for all of them but the coefficients of shortcuts; see
    ``surgery.parameter_groups``. ``adamw`` is torch's, fused where torch has that for the devices
    the parameters are on: one pass over the memory in place of a dozen. ``galore`` projects the
    matrices of the layers that ``targets`` selects and is AdamW for all else.

    Args:
        model: Rewired or not, before it is wrapped for several processes.
        settings: ``config.optim``.
        groups: The trainable parameters in groups of their own; ``surgery.parameter_groups`` by
            default.

    Raises:
        ConfigError: no target of ``galore`` is larger than its rank.
        ModelStateError: nothing in the model is trainable, or a parameter has no data yet.
        NoMatch: ``targets`` of ``galore`` select no trainable matrix.
        CaptureError: ``targets`` ask for a role and the model cannot be traced.
    """
    if groups is None:
        groups = parameter_groups(model, weight_decay=settings.weight_decay)
    _check_trainable(groups)
    lr, betas, eps, fused = settings.lr, settings.betas, settings.eps, _fusable(groups)
    if settings.name == "adamw":
        return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
    split = _projected_apart(groups, model, settings)
    return GaLoreAdamW(split, lr=lr, betas=betas, eps=eps, fused=fused)


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


def _projected_apart(
    groups: Sequence[dict[str, Any]], model: nn.Module, settings: GaloreConfig
) -> list[dict[str, Any]]:
    """Groups for GaLore: what is projected first, then the others as they were, less that."""
    targets = _targets(model, settings.targets)
    trained = [parameter for parameter in _parameters(groups) if id(parameter) in targets]
    if all(min(parameter.shape) <= settings.rank for parameter in trained):
        widest = max(min(parameter.shape) for parameter in trained)
        raise ConfigError(
            f"optim.rank {settings.rank} is no less than the shorter side of every target, "
            f"{widest} at most, so that nothing would be saved",
            hint=f"take a rank below {widest}, or optim.name: adamw",
        )
    apart: dict[str, Any] = {
        "params": trained,
        "weight_decay": settings.weight_decay,
        "rank": settings.rank,
        "gap": settings.gap,
        "scale": settings.scale,
        "mode": settings.mode,
    }
    others = [
        group | {"params": [p for p in group["params"] if id(p) not in targets]} for group in groups
    ]
    return [apart, *(group for group in others if group["params"])]


def _targets(model: nn.Module, where: Where) -> set[int]:
    """The ids of the trainable matrices of the layers that are meant."""
    selection = select(ModelMap(model), where, None, _accepts)
    if not selection.matched:
        raise NoMatch(
            f"optim.targets {where.dump()} selects no trainable matrix for galore"
            f"{selection.nearest}",
            hint="name other targets, such as optim.targets: {type: Linear}, or use adamw",
        )
    return {id(site.weight) for site in selection.matched}


def _accepts(site: Site) -> Match:
    weight = site.weight
    if weight is None or weight.dim() != 2:
        return Match.no("it holds no matrix")
    if not weight.requires_grad:
        return Match.no("it is not trained")
    return Match.yes("it holds a matrix that is trained")


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
