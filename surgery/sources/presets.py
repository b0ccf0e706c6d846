"""Presets: named architectures of papers, built as their library's own class."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from architectures.backbones import FAMILIES, PRESETS, Preset, UnknownPreset, preset
from surgery.errors import SourceError
from surgery.sources import diffusers_models, plain_models, timm_models, transformers_models
from surgery.sources.request import Request

_ADAPTERS: dict[str, ModuleType] = {
    "timm": timm_models,
    "transformers": transformers_models,
    "diffusers": diffusers_models,
    "plain": plain_models,
}


def near(text: str) -> list[str]:
    """Names of presets that resemble ``text``, at most two."""
    return difflib.get_close_matches(text, PRESETS, n=2, cutoff=0.7)


def listed() -> list[dict[str, str]]:
    """Presets and patterns of names, each with what it stands for; nothing of it is imported."""
    named = [{"name": each.name, "origin": _summary(each)} for each in PRESETS.values()]
    return [*named, *({"name": pattern, "origin": "any depth"} for pattern in FAMILIES)]


def build(name: str, request: Request) -> tuple[nn.Module, str]:
    """The preset ``name``, and the library its class is of.

    Its arguments are the preset's with ``request.config`` over them. Weights are random, drawn as
    in the preset's paper from torch's global generator.

    Raises:
        SourceError: there is no such preset, it has no weights to load, or an override is unknown.
    """
    found = _found(name)
    if request.pretrained:
        raise SourceError(
            f"preset:{name} is an architecture; no weights belong to it",
            hint="pass pretrained=False, or load weights with hub:ORG/NAME or from a folder",
        )
    merged = replace(request, config={**found.config, **request.config})
    adapter = _ADAPTERS[found.library]
    initialise = _INITIALISE.get(found.cls)
    if initialise is None:
        return adapter.build(found.cls, merged), found.library
    # Drawn on the CPU in float32 whatever was asked for, so that the values are the same.
    construction = torch.device("meta" if request.device.type == "meta" else "cpu")
    model: nn.Module = adapter.build(
        found.cls, replace(merged, device=construction, dtype=torch.float32)
    )
    initialise(model)
    return nn.Module.to(model, device=request.device, dtype=request.dtype), found.library


def _summary(found: Preset) -> str:
    where = "" if found.library == "plain" else f"{found.library} "
    return f"{where}{found.cls}, {found.parameters:,} parameters; {found.source}"


def _found(name: str) -> Preset:
    try:
        return preset(name)
    except UnknownPreset as error:
        guesses = " or ".join(f"'preset:{each}'" for each in error.near)
        hint = f"did you mean {guesses}?" if guesses else f"known: {', '.join(_patterns())}"
        raise SourceError(f"preset:{name}: {error}", hint=hint) from None


def _patterns() -> list[str]:
    """Every preset by name, but those of a family as the family's pattern."""
    single = [each for each in PRESETS if all(find(each) is None for find in FAMILIES.values())]
    return [*single, *FAMILIES]


def _initialise_dit(model: nn.Module) -> None:
    """The weights of a new DiT, as the authors' code draws them (arXiv 2212.09748, section 3.2).

    diffusers' class zeroes nothing, so that its blocks would not start as the identity (adaLN-Zero)
    nor its output at zero. It also registers embedders of timestep and label in every block, where
    the paper's network has one; here all blocks hold the first one's.
    """
    dit = cast("Any", model)
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = dit.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    nn.init.zeros_(patches.bias)
    shared = dit.transformer_blocks[0].norm1.emb
    nn.init.normal_(shared.class_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(shared.timestep_embedder.linear_1.weight, std=0.02)
    nn.init.normal_(shared.timestep_embedder.linear_2.weight, std=0.02)
    for block in dit.transformer_blocks:
        block.norm1.emb = shared
    for zeroed in (
        *(block.norm1.linear for block in dit.transformer_blocks),
        dit.proj_out_1,
        dit.proj_out_2,
    ):
        nn.init.zeros_(zeroed.weight)
        nn.init.zeros_(zeroed.bias)


#: Classes whose own initialisation is not the paper's.
_INITIALISE: dict[str, Callable[[nn.Module], None]] = {"DiTTransformer2DModel": _initialise_dit}
