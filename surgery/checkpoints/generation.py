"""The generation config that transformers keeps on a model beside its config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from surgery.errors import CheckpointError

_ATTRIBUTE = "generation_config"


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The generation config as JSON-able data; None for a model that does not generate."""
    found = model.__dict__.get(_ATTRIBUTE)
    if found is None:
        return None
    from transformers import GenerationConfig

    if not isinstance(found, GenerationConfig):
        return None
    return cast("dict[str, Any]", json.loads(found.to_json_string(use_diff=False)))


def put_back(model: nn.Module, data: Mapping[str, Any] | None) -> None:
    """Give a model the generation config that ``describe`` described.

    Raises:
        CheckpointError: transformers does not accept it.
    """
    if data is None:
        return
    from transformers import GenerationConfig

    build = cast("Callable[[dict[str, Any]], Any]", GenerationConfig.from_dict)  # pyright: ignore[reportUnknownMemberType]
    try:
        config = build(dict(data))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the saved generation config does not load: {error}") from None
    model.__dict__[_ATTRIBUTE] = config
