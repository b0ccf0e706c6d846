"""What a low-rank method does around the step of an ordinary torch optimizer.

A ``StepRule`` sees the factors of all adapters of one kind right before the optimizer steps, when
their gradients are final, and right after it. It is attached by the optimizer's own hooks, so it
works wherever ``optimizer.step()`` is called: in a hand-written loop, by a ``GradScaler``, by
accelerate and by the transformers Trainer. In order::

    backward (several, if gradients accumulate)
    scaler.unscale_(optimizer)
    clip_grad_norm_(parameters, limit)
    optimizer.step()
        rule.before(optimizer)      gradients are accumulated, unscaled, clipped, and finite
        the optimizer's own update
        rule.after(optimizer)

A gradient that is not finite makes the whole step void: no parameter, no moment and nothing a rule
keeps changes, and a message is logged. What a rule keeps travels in ``optimizer.state_dict()``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from surgery.errors import CheckpointError, ModelStateError
from surgery.optim.moments import climbing

logger = logging.getLogger("surgery")

#: Before the names of what a rule keeps in an optimizer's state.
PREFIX = "surgery_"
#: What to use instead where a rule does not go with gradients that are taken uphill.
GO_UPHILL = "use a method that goes with it, such as lora, reflora, reflora-s or nora-plus"
_STEPS = f"{PREFIX}steps"
_NOTHING = f"{PREFIX}nothing"


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapter as the optimizer sees it: ``W' = W + scaling · B A``.

    Attributes:
        name: Name of the adapter in the model, for messages and for the state.
        A: ``(*stack, rank, in)``.
        B: ``(*stack, out, rank)``.
        scaling: Factor of ``B A``.
        fold: Adds a change ``(*stack, out, in)`` to the frozen base weight, in place, rounding
            once, and returns what rounding lost of it, in the dtype of the change; None where the
            rule leaves the base alone (``StepRule.folds``).
        base_dtype: Dtype of the base weight where there is a ``fold``.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    fold: Callable[[Tensor], Tensor] | None = None
    base_dtype: torch.dtype | None = None

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return self.A.shape[-2]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 spread the factors over ranks, so that both are DTensors."""
        return is_sharded(self.A) or is_sharded(self.B)


class StepRule(ABC):
    """What one method does before and after an optimizer's step.

    A subclass takes the options of its method as keyword arguments. It is called without autograd
    and without autocast.

    Args:
        factors: The adapters it governs.

    Attributes:
        factors: The same.
        steps: How many steps the optimizer took with this rule; void ones do not count.
        kept: Adapter name → name → tensor: what the rule keeps from step to step. It is saved and
            restored with the optimizer's state, bit for bit. Fill it when the rule is built:
            torch's distributed checkpoints load only what is there already.
    """

    #: Whether the rule changes the frozen base weight; ``Factors.fold`` is there only then.
    folds: ClassVar[bool] = False
    #: Whether gradients that were taken elsewhere than at the factors will do, as SAM takes them: a
    #: rule for which the two are of one gradient of the weight, ``grad_A = s Bᵀ G``, needs its own.
    uphill: ClassVar[bool] = False

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.factors = tuple(factors)
        self.steps = 0
        self.kept: dict[str, dict[str, Tensor]] = {}

    @abstractmethod
    def before(self, optimizer: Optimizer) -> None:
        """Work on final gradients: accumulated, unscaled, clipped, finite, some not zero."""

    def after(self, optimizer: Optimizer) -> None:  # noqa: B027 - most rules have nothing to do
        """Work on the factors that the optimizer has just changed."""

    def with_gradients(self) -> list[Factors]:
        """The adapters that have a part in this step: both factors have a gradient."""
        return [
            each for each in self.factors if each.A.grad is not None and each.B.grad is not None
        ]

    def state_dict(self) -> dict[str, Any]:
        """``{"steps": int, "kept": {adapter name: {name: tensor}}}``."""
        return {"steps": self.steps, "kept": {name: dict(own) for name, own in self.kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` gave.

        Raises:
            CheckpointError: it is the state of other adapters.
        """
        kept = cast("Mapping[str, Mapping[str, Tensor]]", state["kept"])
        ours, theirs = _names(self.kept), _names(kept)
        if ours != theirs:
            differing = min(ours ^ theirs)
            holder = "the state" if differing in theirs else "this run"
            raise CheckpointError(
                f"of {type(self).__name__}, only {holder} has {differing[1]!r} of the adapter "
                f"{differing[0]!r}",
                hint="load the optimizer state into the model and recipe it was saved with",
            )
        self.steps = int(state["steps"])
        devices = {each.name: each.A.device for each in self.factors}
        self.kept = {
            name: {key: value.detach().to(devices[name], copy=True) for key, value in own.items()}
            for name, own in kept.items()
        }

    def attach(self, optimizer: Optimizer) -> Attached:
        """Have ``before`` and ``after`` called around each step of an optimizer.

        Raises:
            ModelStateError: the optimizer lacks one of the factors, has a rule for one already, or
                evaluates the loss several times per step (LBFGS), or the optimizer steps with
                gradients taken uphill and the rule needs them at the factors.
        """
        return Attached(optimizer, self)


def _names(kept: Mapping[str, Mapping[str, Tensor]]) -> set[tuple[str, str]]:
    return {(adapter, name) for adapter, own in kept.items() for name in own}


class Attached:
    """A rule at work around an optimizer's steps, until ``detach``."""

    def __init__(self, optimizer: Optimizer, rule: StepRule) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._acted = False
        self._loaded: dict[str, Any] | None = None
        _check(optimizer, rule)
        _attached.setdefault(optimizer, []).append(self)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._read),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]

    def detach(self) -> None:
        """Leave the optimizer as it was; its moments stay. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        others = _attached.get(self.optimizer, [])
        if self in others:
            others.remove(self)

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Torch's pre-hook: ``args`` starts with the optimizer itself."""
        self._acted = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._act()
            return None

        def evaluated() -> Any:
            loss = closure()
            self._act()
            return loss

        return args[:1], {**kwargs, "closure": evaluated}

    @torch.no_grad()
    def _act(self) -> None:
        _check_held(self.optimizer, self.rule)
        gradients = _gradients(self.optimizer)
        if not gradients:
            return
        _unscale(self.optimizer, gradients)
        largest = _largest(gradients)
        if largest == 0:
            return  # as torch's checkpointing does to make an optimizer show its state
        if largest < float("inf"):
            with _without_autocast(gradients[0].device):
                self.rule.before(self.optimizer)
            self._acted = True
            return
        logger.warning(
            "a step of %s is void: %s is not finite; parameters, moments and the state of %s are "
            "as before",
            type(self.optimizer).__name__,
            _culprit(self.optimizer, self.rule),
            type(self.rule).__name__,
        )
        # Every torch optimizer passes over a parameter that has no gradient.
        for parameter in _parameters(self.optimizer):
            if parameter.grad is not None:
                self._withheld.append((parameter, parameter.grad))
                parameter.grad = None

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self._withheld:
            for parameter, gradient in self._withheld:
                parameter.grad = gradient
            self._withheld.clear()
        if not self._acted:
            return
        self._acted = False
        with _without_autocast(self.rule.factors[0].A.device):
            self.rule.after(optimizer)
        self.rule.steps += 1

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Put the rule's state beside the optimizer's, in the state of each A.

        There it survives whatever renames or reshards optimizer states by parameter.
        """
        state = self.rule.state_dict()
        packed = dict(state_dict["state"])
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        if not any(packed.values()):
            # torch's distributed state dicts want a state of every parameter, or of none.
            packed = {key: {_NOTHING: torch.zeros(())} for key in keys}
        for each, key in self._keys(state_dict).items():
            own = {f"{PREFIX}{name}": value for name, value in state["kept"].get(each, {}).items()}
            steps = torch.tensor(float(state["steps"]))
            packed[key] = {**packed.get(key, {}), _STEPS: steps, **own}
        return {**state_dict, "state": packed}

    def _read(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take the rule's state out of a state dict that is about to be loaded."""
        packed = {
            key: {name: value for name, value in entry.items() if name != _NOTHING}
            for key, entry in cast("dict[Any, dict[str, Any]]", state_dict["state"]).items()
        }
        kept: dict[str, dict[str, Tensor]] = {}
        steps: set[int] = set()
        for each, key in self._keys(state_dict).items():
            entry = packed.get(key, {})
            if not entry:
                continue
            own = {name: entry.pop(name) for name in list(entry) if name.startswith(PREFIX)}
            steps.add(int(own.pop(_STEPS, -1)))
            kept[each] = {name.removeprefix(PREFIX): value for name, value in own.items()}
        if not steps and not self.rule.steps:
            return {**state_dict, "state": packed}  # of an optimizer that has made no step either
        if -1 in steps or len(steps) != 1:
            raise CheckpointError(
                f"the optimizer state was saved without {type(self.rule).__name__}, or with other "
                "adapters",
                hint="load the state first and attach the rule afterwards, to start the rule anew",
            )
        self._loaded = {"steps": steps.pop(), "kept": kept}
        return {**state_dict, "state": {key: entry for key, entry in packed.items() if entry}}

    def _load(self, optimizer: Optimizer) -> None:
        if self._loaded is not None:
            self.rule.load_state_dict(self._loaded)
        self._loaded = None

    def _keys(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Adapter name → key of its A in a state dict: a number, or a name in distributed ones."""
        ours = [each for group in self.optimizer.param_groups for each in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        if len(keys) != len(ours):
            return {}  # torch says what is wrong with such a state
        places = {id(parameter): key for parameter, key in zip(ours, keys, strict=True)}
        return {each.name: places[id(each.A)] for each in self.rule.factors}


_attached: WeakKeyDictionary[Optimizer, list[Attached]] = WeakKeyDictionary()


def rules_of(optimizer: Optimizer) -> list[StepRule]:
    """The rules that are attached to an optimizer."""
    return [each.rule for each in _attached.get(optimizer, [])]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values on this rank: gathered if it is a DTensor, else itself."""
    return cast("Any", tensor).full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: a part if it is a DTensor, else itself."""
    return cast("Any", tensor).to_local() if is_sharded(tensor) else tensor


def write(target: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, of which this rank may hold but a part.

    Args:
        target: A tensor or a DTensor.
        value: Plain, of the target's full shape, equal on all ranks; any dtype.
    """
    if not is_sharded(target):
        target.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    spread = cast("Any", target)
    # Every rank has the value, so nothing need be sent.
    part = distribute_tensor(
        value.to(target.dtype), spread.device_mesh, spread.placements, src_data_rank=None
    )
    local(target).copy_(local(part))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters, each once, in the order in which a state dict counts them."""
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return list(dict.fromkeys(cast("list[Tensor]", found)))


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [each.grad for each in _parameters(optimizer) if each.grad is not None]


def _unscale(optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
    """Do what a GradScaler leaves to a fused kernel: rules need gradients as they are."""
    # GradScaler.step sets it on optimizers with `_step_supports_amp_scaling`, for one step.
    scale = cast("Tensor | None", optimizer.__dict__.get("grad_scale"))
    if scale is None:
        return
    for gradient in gradients:
        gradient.div_(scale.to(gradient.device))
    cast("Any", optimizer).grad_scale = None


def _largest(gradients: Sequence[Tensor]) -> float:
    """The largest magnitude of all gradients, inf if one is not finite. One synchronisation."""
    local = [_stored(gradient) for gradient in gradients]
    filled = [each for each in local if each.numel()]
    device = local[0].device
    largest = torch.zeros((), device=device)
    if filled:
        norm = nn.utils.get_total_norm(filled, float("inf"))
        largest = norm.to(device, torch.float32).nan_to_num(float("inf"), posinf=float("inf"))
    for group in _groups(gradients):
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest.item()


def _stored(gradient: Tensor) -> Tensor:
    """The numbers that this rank holds of a gradient."""
    held = local(gradient)
    return held.coalesce().values() if held.is_sparse else held


def _groups(gradients: Iterable[Tensor]) -> list[Any]:
    """The process groups over which sharded gradients are spread, each once."""
    meshes = {cast("Any", each).device_mesh for each in gradients if is_sharded(each)}
    groups = {group.group_name: group for mesh in meshes for group in mesh.get_all_groups()}
    return [groups[name] for name in sorted(groups)]


def _culprit(optimizer: Optimizer, rule: StepRule) -> str:
    """Which gradient is not finite, as far as this rank sees it."""
    names = {id(each.A): f"the gradient of A of {each.name}" for each in rule.factors}
    names |= {id(each.B): f"the gradient of B of {each.name}" for each in rule.factors}
    for index, parameter in enumerate(_parameters(optimizer)):
        if parameter.grad is not None and not _stored(parameter.grad).isfinite().all():
            return names.get(id(parameter), f"the gradient of parameter {index} of the optimizer")
    return "a gradient on another rank"


def _without_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _check(optimizer: Optimizer, rule: StepRule) -> None:
    if not rule.factors:
        raise ModelStateError(
            f"{type(rule).__name__} was given no adapters, so there is nothing to do in a step",
            hint="give it the factors of at least one adapter",
        )
    if isinstance(optimizer, LBFGS):
        raise ModelStateError(
            "LBFGS evaluates the loss several times per step, so there is no moment at which its "
            f"gradients are final for {type(rule).__name__}",
            hint="use an optimizer with one gradient per step, such as AdamW or SGD",
        )
    if optimizer in climbing and not rule.uphill:
        raise ModelStateError(
            f"{type(rule).__name__} takes the gradients for those at the factors as they are, and "
            "this optimizer steps with gradients taken uphill of them (SAM, VASSO)",
            hint=f"train without sharpness, or {GO_UPHILL}",
        )
    _check_held(optimizer, rule)
    ours = {id(each.A): each.name for each in rule.factors}
    for other in _attached.get(optimizer, []):
        for each in other.rule.factors:
            if id(each.A) in ours:
                raise ModelStateError(
                    f"the adapter {ours[id(each.A)]} already has {type(other.rule).__name__} "
                    "around the steps of this optimizer",
                    hint="detach that one first",
                )


def _check_held(optimizer: Optimizer, rule: StepRule) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for each in rule.factors:
        if id(each.A) in held and id(each.B) in held:
            continue
        raise ModelStateError(
            f"the optimizer does not hold the factors of {each.name}, which "
            f"{type(rule).__name__} works on together",
            hint="give it both factors of every adapter; shard the model and prepare it with "
            "accelerate before surgery.adapters.prepare, since that makes new parameters",
        )
