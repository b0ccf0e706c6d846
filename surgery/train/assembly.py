"""The model of a run: random weights, rewritten by the rules, made ready for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from surgery import progress
from surgery.capture.graft import stock_class
from surgery.errors import ModelStateError
from surgery.passes.streams import Segment, all_segments
from surgery.planning import plan
from surgery.select.stacks import find_stacks
from surgery.sources import load
from surgery.train.recompute import recompute
from surgery.tree import named_parameters

if TYPE_CHECKING:
    from surgery.rules import Recipe
    from surgery.train.config import PretrainConfig


def build_model(config: PretrainConfig) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with the rules applied, on the CPU and in train mode; the same on every rank.

    Args:
        config: The configuration; weights are drawn from its seed.

    Returns:
        The model, and what the plan of the rules says people should think about.

    Raises:
        SourceError: the model cannot be built.
        SurgeryError: the rules cannot be applied to it.
    """
    section = config.model
    cast("Any", torch).manual_seed(config.seed)
    with progress.task(f"building {section.source}"):
        model = load(section.source, config=section.config, pretrained=False, dtype=section.dtype)
    recipe = config.recipe
    warnings = () if recipe is None else rewritten(model, recipe)
    if config.train.checkpointing:
        recompute(model)
    return model.train(), warnings


def rewritten(model: nn.Module, recipe: Recipe) -> tuple[str, ...]:
    """Apply a recipe.

    Returns:
        What its plan says people should think about.
    """
    with progress.task(f"applying {recipe.recipe}"):
        planned = plan(model, recipe)
        planned.apply()
    return planned.warnings


def wrapped_classes(model: nn.Module) -> list[str]:
    """Class names of the modules that FSDP2 gathers one at a time.

    Blocks, modules that several blocks have in common (DiT's embedder), and what mixes states.
    """
    blocks = _blocks(model)
    units = {stock_class(module).__name__ for module in (*blocks.values(), *_common(blocks))}
    mixers = {Segment.__name__} if any(True for _ in all_segments(model)) else set[str]()
    return sorted(units | mixers)


def check_shardable(model: nn.Module) -> None:
    """Refuse for FSDP2 a model whose blocks share parameters other than those of a whole module.

    Raises:
        ModelStateError: there is such a parameter; with its name.
    """
    first: dict[int, str] = {}
    blocks = _blocks(model)
    apart = {id(p) for module in _common(blocks) for p in module.parameters()}
    for layer, block in blocks.items():
        for name, parameter in named_parameters(block):
            shared = first.setdefault(id(parameter), layer) != layer
            if shared and id(parameter) not in apart:
                raise ModelStateError(
                    f"fsdp2 shards one block at a time, and {first[id(parameter)]} and {layer} "
                    f"share {name}",
                    hint="use train.parallel=ddp",
                )


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    layers = [layer for stack in find_stacks(model) for layer in stack.layers]
    return {layer: model.get_submodule(layer) for layer in layers}


def _common(blocks: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Modules that are part of several blocks, and not of another such module."""
    owners: dict[nn.Module, set[nn.Module]] = {}
    for block in set(blocks.values()):
        for module in block.modules():
            if module is not block:
                owners.setdefault(module, set()).add(block)
    common = [module for module, found in owners.items() if len(found) > 1]
    inner = {child for module in common for child in module.modules() if child is not module}
    return [module for module in common if module not in inner]
