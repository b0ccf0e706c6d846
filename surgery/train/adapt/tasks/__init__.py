"""Tasks to adapt to: one kind per file, opened by the ``data`` section of a configuration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.train.adapt.tasks.configs import TaskConfig
    from surgery.train.data.base import Data

# Kinds by name → ``module:function``, imported when asked for.
OPENERS: dict[str, str] = {
    "sinusoid": "surgery.train.adapt.tasks.sinusoid:open_sinusoid",
    "episodes": "surgery.train.adapt.tasks.labelled:open_labelled",
    "arrays": "surgery.train.adapt.tasks.labelled:open_arrays",
    "omniglot": "surgery.train.adapt.tasks.omniglot:open_omniglot",
    "mini-imagenet": "surgery.train.adapt.tasks.mini_imagenet:open_mini_imagenet",
}


def open_tasks(config: TaskConfig, *, seed: int) -> Data:
    """Open the tasks a configuration names.

    Args:
        config: The ``data`` section.
        seed: What the tasks of the training are drawn from. Held-out tasks and the division of the
            classes do not depend on it.

    Raises:
        DataError: the data is missing or broken, or cannot fill tasks of this size.
    """
    module, _, function = OPENERS[config.kind].partition(":")
    return getattr(importlib.import_module(module), function)(config, seed=seed)
