"""Libraries that only some kinds of data need, imported when such data is opened."""

from __future__ import annotations

import importlib
from typing import Any

from surgery.errors import DataError


def require(module: str, what: str) -> Any:
    """Import a module of a library that may not be installed.

    Args:
        module: Dotted name, such as ``torchvision.transforms.v2``.
        what: What needs it, as the beginning of a sentence.

    Raises:
        DataError: it is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{what}: {error.name} is not installed",
            hint="pip install 'model-surgery[train]'",
        ) from None
