"""Which parameters of a module are duals of a mirror map; ``duals`` says what maps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

#: The child that holds the maps of a module.
MAPS = "mirror"
#: The attribute that says which parameters of a module are mapped, and by what.
LINKS = "_surgery_mirror"


def links_of(module: nn.Module) -> Mapping[str, Any]:
    """Parameter → what maps it, of the parameters of a module that are duals."""
    return cast("Mapping[str, Any]", module.__dict__.get(LINKS, {}))


def is_mapped(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter of a module is a dual: its forward computes with another value."""
    return parameter in links_of(module)
