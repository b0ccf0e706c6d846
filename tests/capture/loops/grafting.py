"""Rewrite every loop of a model that runs the blocks of its stacks."""

from __future__ import annotations

from torch import nn

from surgery.capture.graft import graft, stock_class
from surgery.capture.loops import Loops, Stack, loop_mixins
from surgery.select.stacks import find_stacks


def drivers(model: nn.Module) -> dict[str, list[Stack]]:
    """Every module from the model down to a stack's container, and the stacks below it.

    Any of them may have code that runs the blocks: `nn.Sequential` its own, a model those of its
    lists, and with checkpointing even those of its stages.
    """
    found: dict[str, list[Stack]] = {}
    for stack in find_stacks(model):
        names = tuple(layer.rpartition(".")[2] for layer in stack.layers)
        parts = stack.path.split(".") if stack.path else []
        for depth in range(len(parts) + 1):
            container = ".".join(parts[depth:])
            found.setdefault(".".join(parts[:depth]), []).append(Stack(container, names))
    return found


def rewrite(model: nn.Module, runtime: str) -> dict[str, Loops]:
    """Graft rewritten loops onto every driver; what was made for each."""
    made: dict[str, Loops] = {}
    for path, stacks in drivers(model).items():
        driver = model.get_submodule(path)
        made[path] = loop_mixins(
            stock_class(driver), tuple(stacks), f"tests.capture.loops.runtimes:{runtime}"
        )
        for mixin in made[path].mixins:
            graft(driver, mixin)
    return made


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each stack, in order."""
    return [[model.get_submodule(layer) for layer in stack.layers] for stack in find_stacks(model)]
