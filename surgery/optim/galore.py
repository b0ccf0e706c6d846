"""GaLore: Adam on gradients projected to a low rank.

Source: "GaLore: memory-efficient LLM training by gradient low-rank projection", arXiv 2403.03507.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from surgery.optim.projection import MODES, Bases, empty_bases, principal_bases

_PROJECTION_KEYS = frozenset({"gap", "scale", "mode"})
_STRUCTURE = ("rank", "mode")
"""What decides the shapes of the state, and so cannot differ between a run and its resumption."""


class GaLoreAdamW(Optimizer):
    """AdamW whose moments live in a subspace of the gradient that is renewed now and then.

    For a weight ``W`` ``(m, n)`` with ``m ≥ n``, and ``P`` ``(r, n)`` the first right singular
    vectors of its gradient of every ``gap``-th step (with ``m < n`` the left ones)::

        R = G Pᵀ                                 (m, r)
        N = M̂ / (√V̂ + ε)    Adam's moments of R  (m, r)
        W ← (1 - lr · weight_decay) W - lr · scale · N P

    Moments are kept when ``P`` changes, as the authors do, and the arbitrary signs of singular
    vectors follow those before, so that kept momentum does not turn around. What is projected is
    whatever ``.grad`` holds when ``step`` is called: after accumulation, after clipping, after the
    average over ranks. Moments and ``P`` have the dtype of the weight; singular vectors are
    computed in float32 or better.

    Two deviations from the authors' code, both where it leaves the paper: ε is added to the
    bias-corrected root, and weight decay is that of the weight before the update, as in
    ``torch.optim.AdamW``. A third one: a gradient that is zero throughout (the branches of a DiT
    at the start, where the gates are zero) has no singular vectors to speak of, so ``P`` is
    computed at the first step that has a gradient; until then the weight only decays.

    **Several ranks.** Under DDP the gradients of all ranks are equal, but singular vectors of close
    singular values turn with the last bit of rounding; no convention of signs or order would make
    two kinds of GPU agree. So each ``P`` is computed by one rank and broadcast: all have the
    same bits, and the ranks share the work. Sharded parameters (FSDP2) are refused.

    Args:
        params: Parameters, named or not, or groups. A group with the key ``rank`` is projected;
            it may also have ``gap`` (200), ``scale`` (0.25) and ``mode`` (``std``; or
            ``reverse_std``, ``left``, ``right``, ``full``, see ``surgery.optim.projection``).
            Every other group is plain AdamW.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: ε.
        weight_decay: Decoupled.
        fused: Whether torch's fused kernel computes the moments.
        process_group: Ranks that hold the same parameters and gradients; by default all ranks,
            where ``torch.distributed`` is initialised.

    Raises:
        ValueError: an option has a value that it cannot have, or a projected parameter is no
            matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        fused: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "fused": fused,
        }
        self.process_group = process_group
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer lists what a copy has; without the group, one would speak to all ranks.
        return super().__getstate__() | {"process_group": self.process_group}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; with the key ``rank`` it is projected.

        Raises:
            ValueError: as for the constructor.
        """
        if "rank" in param_group:
            param_group.setdefault("gap", 200)
            param_group.setdefault("scale", 0.25)
            param_group.setdefault("mode", "std")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_options(group)
        if "rank" in group:
            for parameter in group["params"]:
                _check_matrix(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, bases and their age.

        Raises:
            ValueError: the state is that of groups of another rank or mode, whose moments have
                other shapes.
        """
        saved = [_structure(group) for group in state_dict["param_groups"]]
        ours = [_structure(group) for group in self.param_groups]
        if saved != ours:
            raise ValueError(
                f"the state was saved with (rank, mode) {saved} for its groups, this optimizer "
                f"has {ours}; build it as it was, or start with fresh moments"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            RuntimeError: a gradient is sparse, or not finite when a projection is due.
            TypeError: a projected parameter is sharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        projected = [
            _Projected(parameter, self.state[parameter], group)
            for group in self.param_groups
            if "rank" in group
            for parameter in _with_gradient(group)
        ]
        for one in projected:
            _check_matrix(one.parameter)
        self._renew([one for one in projected if one.due()])
        for one in projected:
            one.update()
        for group in self.param_groups:
            if "rank" not in group:
                _update_plain(group, self.state)
        return loss

    def _renew(self, due: Sequence[_Projected]) -> None:
        """New bases; with several ranks, each is computed by one and sent to the others."""
        many = dist.is_available() and dist.is_initialized()
        rank = dist.get_rank(self.process_group) if many else 0
        ranks = dist.get_world_size(self.process_group) if many else 1
        # First all computation and then all communication, or each rank would wait for the other.
        for index, one in enumerate(due):
            one.renew(compute=index % ranks == rank)
        if ranks == 1:
            return
        for index, one in enumerate(due):
            for basis in one.kept_bases():
                dist.broadcast(basis, group=self.process_group, group_src=index % ranks)


@dataclass(frozen=True)
class _Projected:
    """A parameter of a projected group in one step.

    Its state: ``left`` and ``right`` as far as the mode has them; ``age``, the number of steps
    they were used for; and ``step``, ``exp_avg`` and ``exp_avg_sq`` as torch's AdamW has them.
    """

    parameter: Tensor
    state: dict[str, Any]
    group: dict[str, Any]

    @property
    def gradient(self) -> Tensor:
        return cast("Tensor", self.parameter.grad)

    def due(self) -> bool:
        """Whether there must be new bases, and the gradient has something to make them of."""
        if "age" in self.state and self.state["age"] < self.group["gap"]:
            return False
        largest = self.gradient.abs().amax().item()
        if largest < float("inf"):
            return largest > 0
        raise RuntimeError(
            f"the gradient of a projected parameter of shape {tuple(self.parameter.shape)} is not "
            "finite in a step that computes its projection; skip such a step, as a GradScaler does"
        )

    def renew(self, *, compute: bool) -> None:
        """Compute the bases, or make room for those of another rank."""
        rank, mode = self.group["rank"], self.group["mode"]
        if compute:
            bases = principal_bases(self.gradient, rank, mode, before=self._bases())
        else:
            bases = empty_bases(self.gradient, rank, mode)
        found = {"left": bases.left, "right": bases.right}
        self.state.update({name: basis for name, basis in found.items() if basis is not None})
        self.state["age"] = 0

    def kept_bases(self) -> list[Tensor]:
        return [self.state[name] for name in ("left", "right") if name in self.state]

    def _bases(self) -> Bases:
        return Bases(self.state.get("left"), self.state.get("right"))

    def update(self) -> None:
        keep = 1 - self.group["lr"] * self.group["weight_decay"]
        if "age" not in self.state:
            self.parameter.mul_(keep)
            return
        bases = self._bases()
        low = bases.project(self.gradient)
        _start_moments(self.state, low)
        # AdamW on a parameter that is zero, with a learning rate of 1: what is left is -N.
        update = torch.zeros_like(low)
        _adamw([update], [low], [self.state], self.group, lr=1.0, weight_decay=0.0)
        by = self.group["lr"] * self.group["scale"]
        bases.add_back(self.parameter, update, keep=keep, by=by)
        self.state["age"] += 1


def _update_plain(group: dict[str, Any], states: Any) -> None:
    parameters = _with_gradient(group)
    if not parameters:
        return
    for parameter in parameters:
        _start_moments(states[parameter], parameter)
    gradients = [cast("Tensor", parameter.grad) for parameter in parameters]
    held = [states[parameter] for parameter in parameters]
    lr, weight_decay = group["lr"], group["weight_decay"]
    _adamw(parameters, gradients, held, group, lr=lr, weight_decay=weight_decay)


def _adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: Sequence[dict[str, Any]],
    group: dict[str, Any],
    *,
    lr: float,
    weight_decay: float,
) -> None:
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


def _start_moments(state: dict[str, Any], like: Tensor) -> None:
    if "step" in state:
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=like.device)
    state["exp_avg"] = torch.zeros_like(like)
    state["exp_avg_sq"] = torch.zeros_like(like)


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    found = [parameter for parameter in group["params"] if parameter.grad is not None]
    if any(parameter.grad.is_sparse for parameter in found):
        raise RuntimeError(
            "GaLoreAdamW got a sparse gradient, which has no place in its moments; use "
            "nn.Embedding(sparse=False)"
        )
    return found


def _check_matrix(parameter: Tensor) -> None:
    if _sharded(parameter):
        raise TypeError(
            "a projected parameter is a DTensor: each rank holds a shard of it, and the singular "
            "vectors are those of the whole gradient. Train GaLore under DDP, or use AdamW with "
            "FSDP2, which shards the moments too"
        )
    if parameter.dim() != 2 or not parameter.is_floating_point():
        raise ValueError(
            f"only real matrices are projected, got shape {tuple(parameter.shape)} of "
            f"{parameter.dtype}; give it to a group without 'rank'"
        )


def _sharded(parameter: Tensor) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _check_options(group: dict[str, Any]) -> None:
    betas = group["betas"]
    in_range = {
        "lr": group["lr"] >= 0,
        "betas": len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "eps": group["eps"] >= 0,
        "weight_decay": group["weight_decay"] >= 0,
    }
    if "rank" in group:
        in_range |= {
            "rank": isinstance(group["rank"], int) and group["rank"] > 0,
            "gap": isinstance(group["gap"], int) and group["gap"] > 0,
            "scale": group["scale"] > 0,
            "mode": group["mode"] in MODES,
        }
    elif lonely := sorted(_PROJECTION_KEYS & group.keys()):
        raise ValueError(f"a group has {', '.join(lonely)} but no rank, so nothing is projected")
    for option, right in in_range.items():
        if not right:
            expected = f"one of {', '.join(MODES)}" if option == "mode" else _EXPECTED[option]
            raise ValueError(f"{option} must be {expected}, got {group[option]!r}")


_EXPECTED = {
    "lr": "0 or more",
    "betas": "two numbers from 0 to below 1",
    "eps": "0 or more",
    "weight_decay": "0 or more",
    "rank": "a positive whole number",
    "gap": "a positive whole number",
    "scale": "positive",
}


def _structure(group: dict[str, Any]) -> tuple[object, ...]:
    return tuple(group.get(key) for key in _STRUCTURE)
