"""The weights of an exported model as safetensors."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from surgery import progress
from surgery.checkpoints.inventory import check_storable, take
from surgery.checkpoints.saving import Writer, size_of
from surgery.errors import CheckpointError, ExportError

#: Largest file that weights are written to; a larger model becomes several, with an index.
SHARD = "5GB"


def checked_size(limit: int | str) -> int:
    """Bytes per file, given as a number or as text.

    Raises:
        ExportError: it is neither.
    """
    try:
        return size_of(limit)
    except CheckpointError as error:
        raise ExportError(error.message, hint=error.hint) from None


def write_weights(
    model: nn.Module, folder: Path, stem: str, dropped: frozenset[str], limit: int | str
) -> dict[str, str]:
    """Write what a state dict of the exported model holds, from where it lies in memory.

    Args:
        model: The model.
        folder: Where the files go: ``<stem>.safetensors``, or shards and the hub's index of them.
        stem: What their names begin with.
        dropped: Names of tensors that are left out.
        limit: Bytes per file, as a number or as text such as ``5GB``; a larger tensor gets a file
            of its own.

    Returns:
        Further names of the tensors that were written → the name they were written under.

    Raises:
        ExportError: a tensor cannot be stored, or the limit is none.
    """
    found = take(model)
    state = [(name, tensor) for name, tensor in found.state.items() if name not in dropped]
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in state)
    try:
        for name, tensor in state:
            check_storable(name, tensor)
        # Not hashed on the way: ``surgery.json`` has the hashes of all files, once all are there.
        with progress.task("writing weights", total, "bytes") as task:
            Writer(folder, hashed=False).sharded(stem, state, checked_size(limit), task.advance)
    except CheckpointError as error:
        raise ExportError(error.message, hint=error.hint) from None
    names = {name for name, _ in state}
    return {alias: name for alias, name in found.ties.items() if name in names}
