"""Runtimes for rewritten loops: one that watches, one that makes a bypass visible."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from surgery.capture.loops import block_of

FACTOR = 1.25
_log = threading.local()


def ran() -> list[nn.Module]:
    """The blocks that ran through the runtime in this thread since the last call of this."""
    found = getattr(_log, "blocks", [])
    _log.blocks = []
    return found


class Steps:
    """Changes nothing; notes which blocks ran."""

    def __init__(self, container: nn.Module) -> None:
        self.blocks = {id(module) for module in container.children()}

    def __call__(self, target: Any) -> Callable[..., Any]:
        block = block_of(target)
        if id(block) not in self.blocks:
            return target

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.after(block, target(*args, **kwargs))

        return run

    def through(
        self, function: Callable[..., Any], block: nn.Module | None = None
    ) -> Callable[..., Any]:
        def run(target: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(target, *args, **kwargs)
            ran = block_of(target) if block is None else block
            return self.after(ran, result) if id(ran) in self.blocks else result

        return run

    def sequence(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(blocks: Any, *args: Any, **kwargs: Any) -> Any:
            return function([self(block) for block in blocks], *args, **kwargs)

        return run

    def view(self, function: Callable[[], Any]) -> Callable[[], Any]:
        return function

    def after(self, block: nn.Module | None, result: Any) -> Any:
        _log.blocks = [*getattr(_log, "blocks", []), block]
        return result


class Scaling(Steps):
    """Multiplies every tensor a block returns, so that a block that was bypassed shows."""

    def after(self, block: nn.Module | None, result: Any) -> Any:
        del block
        return scaled(result)


def scaled(result: Any) -> Any:
    """Every floating-point tensor of a result times FACTOR."""
    if isinstance(result, Tensor):
        return result * FACTOR if result.is_floating_point() else result
    if type(result) in (tuple, list):
        return type(result)(scaled(entry) for entry in result)
    if isinstance(result, dict):
        for key, entry in result.items():
            result[key] = scaled(entry)
    return result


def watch(container: nn.Module) -> Steps:
    """A ``begin`` that notes what ran."""
    return Steps(container)


def scale(container: nn.Module) -> Steps:
    """A ``begin`` that scales what blocks return."""
    return Scaling(container)


class Plain(Scaling):
    """Changes and notes nothing."""

    def after(self, block: nn.Module | None, result: Any) -> Any:
        del block
        return result


def plain(container: nn.Module) -> Steps:
    """A ``begin`` that does nothing at all."""
    return Plain(container)
