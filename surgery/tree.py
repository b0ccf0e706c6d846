"""Walk a module tree, with the types that torch's own iterators lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from torch import Tensor, nn


def named_modules(model: nn.Module, *, duplicates: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every dotted path with its module, the root under ``""``.

    Args:
        model: The root.
        duplicates: Whether a module that is registered twice is given under both its paths.
    """
    walk = cast("Callable[..., Iterator[tuple[str, nn.Module]]]", model.named_modules)
    return walk(remove_duplicate=not duplicates)


def named_parameters(
    model: nn.Module, *, duplicates: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """Every dotted name with its parameter.

    Args:
        model: The root.
        duplicates: Whether a tied parameter is given under each of its names.
    """
    return model.named_parameters(remove_duplicate=not duplicates)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters registered on this very module, by name; None entries are left out."""
    own = cast("dict[str, nn.Parameter | None]", module.__dict__["_parameters"])
    return {name: parameter for name, parameter in own.items() if parameter is not None}


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers registered on this very module, by name; None entries are left out."""
    own = cast("dict[str, Tensor | None]", module.__dict__["_buffers"])
    return {name: buffer for name, buffer in own.items() if buffer is not None}


def joined(*parts: str) -> str:
    """A dotted path of its parts, of which the empty one stands for the root."""
    return ".".join(filter(None, parts))


def children(module: nn.Module) -> dict[str, nn.Module]:
    """The children registered on this very module, by name; None entries are left out."""
    own = cast("dict[str, nn.Module | None]", module.__dict__["_modules"])
    return {name: child for name, child in own.items() if child is not None}
