"""Backbones of this project: plain modules in ``architectures.backbones``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from architectures.backbones import MODULES, Backbone
from surgery.errors import SourceError
from surgery.registry import suggest
from surgery.sources.libraries import BUILD_ERRORS, PLAIN, class_path
from surgery.sources.request import Request

LIBRARY = PLAIN


def build(name: str, request: Request) -> nn.Module:
    """The module ``name``; ``config`` are the arguments of its constructor."""
    return _construct(MODULES[name], request)


def describe(model: nn.Module) -> dict[str, Any]:
    """How to rebuild ``model``: the arguments of its constructor.

    Raises:
        SourceError: it is a part of a backbone.
    """
    if not isinstance(model, Backbone):
        raise SourceError(f"{class_path(model)} is a part of a backbone, not a whole one")
    return {"config": model.arguments}


def rebuild(description: Mapping[str, Any], dtype: torch.dtype, request: Request) -> nn.Module:
    """A model of the class and constructor arguments in ``description``."""
    del dtype  # each tensor is cast to its own recorded dtype afterwards
    classes = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in MODULES.values()}
    path = str(description["class"])
    if path not in classes:
        raise SourceError(
            f"{path!r} is not a backbone of this project", hint=suggest(path, classes)
        )
    return _construct(classes[path], request)


def _construct(cls: type[Backbone], request: Request) -> nn.Module:
    accepted = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for key in request.config:
        if key not in accepted:
            raise SourceError(
                f"config: {cls.__name__} takes no {key!r}", hint=suggest(key, accepted)
            )
    try:
        with request.building():
            model = cls(**request.config)
    except BUILD_ERRORS as error:
        raise SourceError(f"{cls.__name__} could not be built: {error}") from error
    return request.placed(model.to(dtype=request.dtype))
