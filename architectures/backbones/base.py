"""What a preset is, and what the plain modules among them have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

Library = Literal["transformers", "diffusers", "timm", "plain"]


@dataclass(frozen=True)
class Preset:
    """A named architecture, as data.

    Attributes:
        name: What it is asked for by, such as ``llama-60m``.
        library: Which library's class it is; ``plain`` for a class in ``MODULES``.
        cls: The class, or for timm the name of its architecture.
        config: Arguments: of the configuration (transformers), of the constructor (diffusers,
            plain), or of ``timm.create_model``.
        parameters: How many distinct parameters the model has when nothing is overridden.
        source: Where the sizes come from.
    """

    name: str
    library: Library
    cls: str
    config: dict[str, Any] = field(hash=False)
    parameters: int
    source: str


class UnknownPreset(ValueError):
    """There is no preset of that name, or a family has none of that depth.

    Attributes:
        near: Names of presets that were perhaps meant; empty if none comes to mind.
    """

    def __init__(self, message: str, near: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.near = near


class Backbone(nn.Module):
    """A plain network from one tensor to class logits.

    A subclass sets, in its constructor:

    Attributes:
        arguments: What it was constructed with, complete, so that it can be built again.
        input_shape: The shape of one sample, without the batch.
    """

    arguments: dict[str, Any]
    input_shape: tuple[int, ...]

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Class logits (batch, classes) of samples (batch, *input_shape)."""
        raise NotImplementedError
