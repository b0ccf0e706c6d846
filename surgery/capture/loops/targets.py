"""What a checkpointing function is given: a block, or modules that hold some."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn


def block_of(target: Any) -> nn.Module | None:
    """The module that a call of ``target`` runs.

    Args:
        target: A module, its bound ``forward`` or ``__call__``, or a `functools.partial` of one of
            these (nested ones too).

    Returns:
        The module, or None if ``target`` is anything else.
    """
    while type(target) is functools.partial:
        target = target.func
    if isinstance(target, types.MethodType):
        runs = target.__name__ in {"forward", "__call__", "_call_impl", "_wrapped_call_impl"}
        target = target.__self__ if runs else None
    return target if isinstance(target, nn.Module) else None


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs modules in sequence, kept from looking inside them.

    ``checkpoint_seq(self.stages, x, flatten=True)`` would run the blocks of every stage, past the
    stages' own forward, where their blocks are mixed.

    Args:
        function: Takes the modules first.
    """

    @functools.wraps(function)
    def run(modules: Iterable[nn.Module], *args: Any, **kwargs: Any) -> Any:
        return function([_Whole(module) for module in modules], *args, **kwargs)

    return run


class _Whole:
    """A module that is called as one, and gives itself when taken apart."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __iter__(self) -> Iterator[_Whole]:
        yield self
