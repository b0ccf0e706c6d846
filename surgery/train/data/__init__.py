"""Training data: one kind per file, opened by the ``data`` section of a configuration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.train.data.base import Batch, Data, Facts, Place, Samples, StreamSamples
    from surgery.train.data.configs import DataConfig, FinetuneDataConfig
    from surgery.train.data.loader import evaluation_loader, training_loader

# Kinds by name → ``module:function``, imported when asked for. The function takes the section of
# its kind and ``seed=``, and returns ``Data``.
OPENERS: dict[str, str] = {
    "text": "surgery.train.data.tokens:open_text",
    "tokens": "surgery.train.data.tokens:open_tokens",
    "stream": "surgery.train.data.stream:open_stream",
    "records": "surgery.train.data.records:open_records",
    "hub": "surgery.train.data.records:open_hub",
    "docstrings": "surgery.train.data.docstrings:open_docstrings",
    "digits": "surgery.train.data.digits:open_digits",
    "shifted-digits": "surgery.train.data.digits:open_shifted",
    "folder": "surgery.train.data.folder:open_folder",
    "cifar": "surgery.train.data.cifar:open_cifar",
    "imagenet": "surgery.train.data.imagenet:open_imagenet",
    "webdataset": "surgery.train.data.webdataset:open_webdataset",
    "latents": "surgery.train.data.latents:open_latents",
}

_HOMES: dict[str, tuple[str, ...]] = {
    "surgery.train.data.base": ("Batch", "Data", "Facts", "Place", "Samples", "StreamSamples"),
    "surgery.train.data.configs": ("DataConfig",),
    "surgery.train.data.loader": ("evaluation_loader", "training_loader"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "OPENERS",
    "Batch",
    "Data",
    "DataConfig",
    "Facts",
    "Place",
    "Samples",
    "StreamSamples",
    "evaluation_loader",
    "open_data",
    "training_loader",
]


def open_data(config: DataConfig | FinetuneDataConfig, *, seed: int) -> Data:
    """Open the data a configuration names.

    Args:
        config: The ``data`` section.
        seed: What augmentation is drawn from. What is held out does not depend on it.

    Raises:
        DataError: the data is missing, empty, broken, or not what the section says.
    """
    module, _, function = OPENERS[config.kind].partition(":")
    return getattr(importlib.import_module(module), function)(config, seed=seed)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
