"""The weights of a model, read once more from where they were loaded."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from surgery.errors import SourceError
from surgery.sources.load import SOURCE_ATTRIBUTE, load
from surgery.sources.request import from_json
from surgery.tree import named_parameters


def why_not_again(model: nn.Module) -> str | None:
    """Why the weights of a model cannot be read again, or None if they can."""
    origin = cast("dict[str, Any] | None", model.__dict__.get(SOURCE_ATTRIBUTE))
    if origin is None:
        return f"this {type(model).__name__} was not loaded with surgery.load"
    if not origin["pretrained"]:
        return f"{origin['spec']} was loaded without pretrained weights"
    return None


def load_again(model: nn.Module) -> dict[str, Tensor]:
    """Name → parameter on the CPU, as ``surgery.load`` gives it for the model's source now.

    The revision of a hub repository is the one that was loaded. Whether the files still hold the
    same is for the caller to check.

    Raises:
        SourceError: the source is not known or cannot be reached.
        CheckpointError: what it holds no longer fits.
    """
    why = why_not_again(model)
    if why is not None:
        raise SourceError(
            f"the original weights cannot be read again: {why}",
            hint="keep_base: memory keeps a copy of every weight that is changed",
        )
    origin = cast("dict[str, Any]", model.__dict__[SOURCE_ATTRIBUTE])
    spec = str(origin["spec"])
    if spec.startswith("hub:") and "@" not in spec and origin["revision"] is not None:
        spec = f"{spec}@{origin['revision']}"
    # What it lacks or has too much was accepted when it was loaded first.
    fresh = load(
        spec,
        config=from_json(origin["config"]),
        pretrained=True,
        device="cpu",
        allow_missing=True,
        allow_unexpected=True,
    )
    return {name: tensor.detach() for name, tensor in named_parameters(fresh)}
