"""Models without weights: parameters on the meta device, buffers with their true values."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def parameters_on_meta() -> Generator[None]:
    """Put every parameter that is registered inside the block on the meta device.

    A tensor that is registered under several names stays one tensor, which
    ``accelerate.init_empty_weights`` does not keep so. What a library allocates for a parameter is
    given back untouched, so that a model of any size is built in the memory of its largest tensor,
    of which no page is written. Models are built by one thread at a time.
    """
    patched = cast("Any", nn.Module)
    stock = cast("Callable[..., None]", nn.Module.register_parameter)
    moved: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        stock(module, name, param)
        if param is None or param.is_meta:
            return
        if param not in moved:
            moved[param] = _emptied(param)
        cast("dict[str, Any]", module.__dict__["_parameters"])[name] = moved[param]

    patched.register_parameter = register
    try:
        yield
    finally:
        patched.register_parameter = stock


def _emptied(parameter: nn.Parameter) -> nn.Parameter:
    empty = nn.Parameter(
        torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
    )
    cast("dict[str, Any]", empty.__dict__).update(parameter.__dict__)
    return empty
