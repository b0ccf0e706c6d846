"""Watches loss and gradient: what is not finite, and what leaps, stops the run or is skipped.

Whether a step may change the weights is decided before it does. On a CUDA device with the fused
AdamW the decision is made there, without waiting for it: the optimizer leaves the weights alone
where ``found_inf`` is set, and the host learns of it at the next line of the log.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from surgery.errors import TrainingError
from surgery.tree import named_modules, named_parameters

if TYPE_CHECKING:
    from surgery.train.config import TrainConfig

Verdict = Literal["fine", "not finite", "spike"]

_MEMORY = 0.98
"""Weight of the past in the running mean of the loss: it looks back about 50 steps."""

_SETTLED = 20
"""Steps before which no loss is called a spike."""

_PATIENCE = 20
"""Skipped steps in a row after which the run stops: skipping does not help."""


@dataclass
class Mean:
    """Running mean of the loss.

    Attributes:
        total: Weighted sum.
        weight: Sum of the weights.
        count: Steps seen.
    """

    total: float = 0.0
    weight: float = 0.0
    count: int = 0

    def add(self, loss: float) -> None:
        """Take one more loss into account."""
        self.total = _MEMORY * self.total + (1 - _MEMORY) * loss
        self.weight = _MEMORY * self.weight + (1 - _MEMORY)
        self.count += 1

    @property
    def value(self) -> float:
        """The mean; infinite as long as it is not settled."""
        return self.total / self.weight if self.count >= _SETTLED else math.inf


def by_itself(optimizer: Optimizer, device: torch.device, *, scaled: bool) -> Optimizer | None:
    """The optimizer, if it can leave out a step without the host knowing and it pays.

    Args:
        optimizer: The plain optimizer.
        device: Where it steps. On the CPU there is nothing to wait for.
        scaled: Whether losses are scaled (fp16), which does the same by its own means.
    """
    fused = isinstance(optimizer, AdamW) and bool(optimizer.defaults["fused"])
    return optimizer if fused and device.type == "cuda" and not scaled else None


class Watch:
    """Judges every step.

    Args:
        train: Section ``train``.
        optimizer: One that can leave out a step by itself (fused AdamW on CUDA); with it no step
            waits for the device.
    """

    def __init__(self, train: TrainConfig, optimizer: Optimizer | None = None) -> None:
        self._train = train
        self._mean = Mean()
        self._skipped = 0
        self._optimizer = optimizer
        self._waiting: list[tuple[int, Tensor, Tensor]] = []

    @property
    def defers(self) -> bool:
        """Whether the optimizer leaves out what is not finite, without a word to the host."""
        return self._optimizer is not None and not self.follows_loss

    def defer(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Tell the optimizer, on its device, whether this step counts.

        Args:
            step: The step.
            loss: Over this rank's samples.
            norm: Norm of the gradient over all parameters, the same on every rank.
        """
        # What GradScaler uses: fused kernels leave weights and moments alone where it is not 0.
        cast("Any", self._optimizer).found_inf = (~norm.isfinite()).float()
        self._waiting.append((step, loss, norm))

    def settled(self) -> Generator[tuple[int, float, float]]:
        """Step, loss and norm of every step that was left out since the last call."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        norms = cast("list[float]", cast("Any", torch.stack([n for *_, n in waiting])).tolist())
        for (step, loss, _), norm in zip(waiting, norms, strict=True):
            if math.isfinite(norm):
                self._skipped = 0
            else:
                yield step, float(loss), norm

    @property
    def follows_loss(self) -> bool:
        """Whether it needs the loss over all ranks at every step."""
        return self._train.on_spike != "ignore"

    def judge(self, loss: float | None, norm: float) -> Verdict:
        """What to think of a step.

        Args:
            loss: Mean over the batch; None where it is not known on every rank.
            norm: Norm of the gradient over all parameters.
        """
        if not math.isfinite(norm) or (loss is not None and not math.isfinite(loss)):
            return "not finite"
        if loss is None or not self.follows_loss:
            return "fine"
        if loss > self._train.spike_factor * self._mean.value:
            return "spike"
        self._mean.add(loss)
        return "fine"

    def stops(self, verdict: Verdict) -> bool:
        """Whether a step that is not fine ends the run."""
        if verdict == "fine":
            self._skipped = 0
            return False
        self._skipped += 1
        chosen = self._train.on_nan if verdict == "not finite" else self._train.on_spike
        return chosen == "stop" or self._skipped >= _PATIENCE

    def describe(self, verdict: Verdict, loss: float, norm: float) -> str:
        """What was seen, for an error or an event."""
        if verdict == "spike":
            limit = f"{self._train.spike_factor:g} times its mean, {self._mean.value:.4g}"
            return f"the loss {loss:.4g} is over {limit}"
        return f"the loss is {loss:.4g} and the norm of the gradient {norm:.4g}"

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {**vars(self._mean), "skipped": self._skipped}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self._mean = Mean(state["total"], state["weight"], int(state["count"]))
        self._skipped = int(state["skipped"])


def failure(step: int, seen: str, positions: tuple[int, int], culprit: str) -> TrainingError:
    """The error that ends a run."""
    first, last = positions
    return TrainingError(
        f"step {step}: {seen}; samples {first}..{last} of the run; {culprit}",
        hint="lower optim.lr, set train.clip, use train.precision=fp32, or go on without such "
        "steps: train.on_nan=skip, train.on_spike=skip",
    )


class Blame:
    """Finds the first module whose output, or the gradient of whose output, is not finite.

    Attributes:
        found: A sentence about it; None while everything is finite.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.found: str | None = weights_that_are_not_finite(model)

    @contextmanager
    def watching(self) -> Generator[None]:
        """Look at the output of every module, and at its gradient, in the passes inside."""
        handles = [
            module.register_forward_hook(self._looked_at(path or "(the model)"))
            for path, module in named_modules(self._model, duplicates=False)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _looked_at(self, path: str) -> Any:
        def look(_module: nn.Module, _args: object, output: object) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    self._blame(f"the output of {path} is the first that is not finite")
                if tensor.requires_grad:
                    cast("Any", tensor).register_hook(self._gradient(path))

        return look

    def _gradient(self, path: str) -> Any:
        def look(gradient: Tensor) -> None:
            if not _finite(gradient):
                self._blame(f"the gradient of the output of {path} is the first not finite")

        return look

    def _blame(self, sentence: str) -> None:
        if self.found is None:
            self.found = sentence


def weights_that_are_not_finite(model: nn.Module) -> str | None:
    """A sentence about the first parameter that is not finite; None if all are."""
    for name, parameter in named_parameters(model):
        if not _finite(parameter.detach()):
            return f"the weight {name} is not finite itself"
    return None


def _finite(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())


def _tensors(output: object) -> Generator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for item in cast("Mapping[object, object]", output).values():
            yield from _tensors(item)
    elif isinstance(output, list | tuple):
        for item in cast("list[object]", output):
            yield from _tensors(item)
