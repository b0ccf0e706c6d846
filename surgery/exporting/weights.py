"""The weights of an exported model as one safetensors file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from surgery.checkpoints import tensorfile
from surgery.checkpoints.inventory import check_storable, take
from surgery.errors import CheckpointError, ExportError


def write_weights(model: nn.Module, file: Path, dropped: frozenset[str]) -> dict[str, str]:
    """Write what a state dict of the exported model holds; returns further names of its tensors.

    Raises:
        ExportError: a tensor cannot be stored.
    """
    found = take(model)
    state = {name: tensor for name, tensor in found.state.items() if name not in dropped}
    try:
        for name, tensor in state.items():
            check_storable(name, tensor)
    except CheckpointError as error:
        raise ExportError(error.message, hint=error.hint) from None
    tensorfile.write(file, list(state.items()), lambda _: None)
    return {alias: name for alias, name in found.ties.items() if name in state}
