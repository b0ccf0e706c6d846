"""Which forward to capture: the module's own, beneath what others put over it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

# Where the code of a wrapper was written that a base class puts around every subclass's forward.
_SUBCLASS_HOOK = "__init_subclass__.<locals>"


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward to capture, bound to the module.

    Beneath a wrapper that was put on the instance (offload hooks), and beneath one that a base
    class puts around the forward of every subclass (gradient checkpointing in transformers):
    that one will be around whatever is grafted, too.
    """
    override = module.__dict__.get("forward")
    of_class = type(module).forward
    if override is not None:
        innermost = inspect.unwrap(override)
        innermost = getattr(innermost, "__func__", innermost)
        if innermost is not inspect.unwrap(of_class):
            return override
    if not isinstance(of_class, types.FunctionType):
        return module.forward
    return types.MethodType(_as_written(of_class), module)


def forward_beneath(cls: type[nn.Module], mixin: type) -> Callable[..., Any]:
    """The forward that ``super().forward`` would be in a method of ``mixin``, for class ``cls``."""
    lineage = cls.__mro__
    for base in lineage[lineage.index(mixin) + 1 :]:
        if "forward" in base.__dict__:
            return _as_written(base.__dict__["forward"])
    raise AssertionError("nn.Module has a forward")


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, types.FunctionType) and _SUBCLASS_HOOK in _written_in(function):
        inner = function.__dict__.get("__wrapped__")
        if inner is None:
            break
        function = inner
    return function


def _written_in(function: types.FunctionType) -> str:
    return function.__code__.co_qualname
