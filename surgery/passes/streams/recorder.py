"""Tells the recorder of hidden states in transformers what a block's state became.

transformers records hidden states with hooks on the blocks, hence before they are mixed, but
``output_hidden_states`` is documented as what goes from layer to layer.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor

_MODULE = "transformers.utils.output_capturing"
_KEY = "hidden_states"
# The variable that holds what is being recorded in this thread; None without transformers. A
# plain global, since torch.compile follows a look at it and not at ``sys.modules``.
_collector: Any = None


def connect() -> None:
    """Look for the recorder, once; a model of transformers has imported it by now."""
    global _collector  # noqa: PLW0603  see above
    if _collector is None and "transformers.modeling_utils" in sys.modules:
        _collector = importlib.import_module(_MODULE)._active_collector


def tell(before: Any, after: Tensor | None) -> None:
    """Put ``after`` where ``before``, this very object, was just recorded."""
    if _collector is None:
        return
    collected = _collector.get()
    if collected is None:
        return
    recorded = collected.get(_KEY)
    if recorded and recorded[-1] is before:
        recorded[-1] = after
