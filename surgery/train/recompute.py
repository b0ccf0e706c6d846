"""Activation checkpointing: activations of blocks are computed again in the backward pass."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, runtime_checkable

from torch import nn

from surgery.errors import ModelStateError
from surgery.select.stacks import find_stacks


@runtime_checkable
class _Transformers(Protocol):
    """A model of transformers says so itself, and has its own way."""

    supports_gradient_checkpointing: bool

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None
    ) -> None: ...


@runtime_checkable
class _Diffusers(Protocol):
    """A model of diffusers."""

    _supports_gradient_checkpointing: bool

    def enable_gradient_checkpointing(self) -> None: ...


@runtime_checkable
class _Timm(Protocol):
    """A model of timm."""

    def set_grad_checkpointing(self, enable: bool = True) -> None: ...


def recompute(model: nn.Module) -> None:
    """Make a model compute the activations of its blocks again in the backward pass.

    The library's own way where the model has one; else torch's composable checkpointing on every
    block of every stack, which changes no name and no class.

    Raises:
        ModelStateError: the model has neither its own way nor a stack of blocks.
    """
    if isinstance(model, _Transformers) and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif isinstance(model, _Diffusers) and model._supports_gradient_checkpointing:  # pyright: ignore[reportPrivateUsage]
        model.enable_gradient_checkpointing()
    elif isinstance(model, _Timm):
        model.set_grad_checkpointing(True)
    else:
        _checkpoint_blocks(model)


def _checkpoint_blocks(model: nn.Module) -> None:
    # Hooks on the blocks themselves: a wrapper would change their names.
    composable: Any = importlib.import_module("torch.distributed._composable")
    paths = [layer for stack in find_stacks(model) for layer in stack.layers]
    if not paths:
        raise ModelStateError(
            f"{type(model).__name__} has no stack of blocks whose activations could be computed "
            "again",
            hint="leave train.checkpointing at false",
        )
    for path in paths:
        composable.checkpoint(model.get_submodule(path))
