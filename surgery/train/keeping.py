"""Which tensors of a model a checkpoint holds: all of them, or those that are not as loaded.

A run that fine-tunes adapters can build its frozen weights anew from where they came from. Its
checkpoints then hold what is trained, buffers, and base weights that a method has changed: they
are found by comparing bytes, not by trusting a method to say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from torch import Tensor, nn

from surgery.checkpoints import base_weights
from surgery.errors import CheckpointError
from surgery.tree import named_parameters


class Kept(ABC):
    """Chooses the tensors of a model that a checkpoint holds, and puts them back."""

    @abstractmethod
    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors to write, by name."""

    @abstractmethod
    def load(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put written tensors back into a model that was built anew.

        Raises:
            CheckpointError: they do not belong to this model.
        """

    @property
    def origin(self) -> str | None:
        """What the tensors that are not written have to be; None where all are written."""
        return None


class Everything(Kept):
    """Every parameter and buffer."""

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state dict."""
        return model.state_dict()

    def load(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Load it strictly."""
        model.load_state_dict(weights)


class Changed(Kept):
    """All but the frozen parameters that are as they were loaded, in every bit.

    Args:
        loaded: The model as it was loaded, before its rules were applied. Its weights are read
            once.
    """

    def __init__(self, loaded: nn.Module) -> None:
        parameters = dict(named_parameters(loaded))
        self._digests = base_weights.digests({name: p.data for name, p in parameters.items()})
        self._buffers = base_weights.digests(_buffers(loaded))

    @property
    def origin(self) -> str | None:
        """A hash of all weights as they were loaded."""
        digest = sha256()
        for name, each in sorted(self._digests.items()):
            digest.update(f"{name} {each}\n".encode())
        return digest.hexdigest()

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What is trained, what the rules added, buffers, and base weights that changed."""
        everything = model.state_dict()
        frozen = self._frozen(model, everything)
        now = base_weights.digests({name: everything[name] for name in frozen})
        same = {name for name in frozen if now[name] == self._digests[name]}
        return {name: tensor for name, tensor in everything.items() if name not in same}

    def moved_buffers(self, model: nn.Module) -> list[str]:
        """Stock buffers that are not as they were loaded, such as running statistics."""
        now = {n: buffer for n, buffer in _buffers(model).items() if n in self._buffers}
        digests = base_weights.digests(now)
        return [name for name in now if digests[name] != self._buffers[name]]

    def load(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put them back; what is not among them stays as it was loaded.

        Raises:
            CheckpointError: a tensor has no place in the model, or one is missing.
        """
        everything = model.state_dict()
        needed = everything.keys() - set(self._frozen(model, everything))
        missing, unknown = needed - weights.keys(), weights.keys() - everything.keys()
        if missing or unknown:
            first = min(missing or unknown)
            raise CheckpointError(
                f"the checkpoint is of another model: {len(missing)} tensors are missing and "
                f"{len(unknown)} have no place, such as {first}",
                hint="resume with the configuration that the run was started with",
            )
        model.load_state_dict(weights, strict=False)

    def _frozen(self, model: nn.Module, everything: Mapping[str, Any]) -> list[str]:
        return [
            name
            for name, parameter in named_parameters(model)
            if name in self._digests and name in everything and not parameter.requires_grad
        ]


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those of the state dict."""
    parameters = {name for name, _ in named_parameters(model)}
    state: Mapping[str, Tensor] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in parameters}
