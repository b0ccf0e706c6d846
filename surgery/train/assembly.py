"""The model of a run: random weights, rewritten by the rules, made ready for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from surgery import progress
from surgery.capture.graft import stock_class
from surgery.errors import ModelStateError
from surgery.passes.streams import Segment, all_segments
from surgery.planning import apply
from surgery.select.stacks import find_stacks
from surgery.sources import load
from surgery.train.recompute import recompute
from surgery.tree import named_parameters

if TYPE_CHECKING:
    from surgery.train.config import PretrainConfig


def build_model(config: PretrainConfig) -> nn.Module:
    """The model with the rules applied, on the CPU and in train mode; the same on every rank.

    Args:
        config: The configuration; weights are drawn from its seed.

    Raises:
        SourceError: the model cannot be built.
        SurgeryError: the rules cannot be applied to it.
    """
    section = config.model
    cast("Any", torch).manual_seed(config.seed)
    with progress.task(f"building {section.source}"):
        model = load(section.source, config=section.config, pretrained=False, dtype=section.dtype)
    recipe = config.recipe
    if recipe is not None:
        with progress.task(f"applying {recipe.recipe}"):
            apply(model, recipe)
    if config.train.checkpointing:
        recompute(model)
    return model.train()


def wrapped_classes(model: nn.Module) -> list[str]:
    """Class names of the modules that FSDP2 gathers one at a time: blocks, and what mixes them."""
    blocks = {
        stock_class(model.get_submodule(layer)).__name__
        for stack in find_stacks(model)
        for layer in stack.layers
    }
    mixers = {Segment.__name__} if any(True for _ in all_segments(model)) else set[str]()
    return sorted(blocks | mixers)


def check_shardable(model: nn.Module) -> None:
    """Refuse for FSDP2 a model whose blocks share parameters.

    Raises:
        ModelStateError: there is such a parameter; with its name.
    """
    first: dict[int, str] = {}
    for layer in (layer for stack in find_stacks(model) for layer in stack.layers):
        for name, parameter in named_parameters(model.get_submodule(layer)):
            if first.setdefault(id(parameter), layer) != layer:
                raise ModelStateError(
                    f"fsdp2 shards one block at a time, and {first[id(parameter)]} and {layer} "
                    f"share {name}",
                    hint="use train.parallel=ddp",
                )
