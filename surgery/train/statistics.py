"""Passes whose activations leave no trace in batch norms' running statistics."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import (
    _NormBase,  # pyright: ignore[reportPrivateUsage] - the base of batch and instance norms
)


def normalisations(model: nn.Module) -> list[_NormBase]:
    """Batch and instance norms: the modules of torch that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _NormBase)]


@contextmanager
def unrecorded(model: nn.Module) -> Generator[None]:
    """Norms in train mode normalise by the batch at hand and record nothing of it.

    Those in eval mode go on using their running statistics.
    """
    recording = [
        module for module in normalisations(model) if module.training and module.track_running_stats
    ]
    for module in recording:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in recording:
            module.track_running_stats = True
