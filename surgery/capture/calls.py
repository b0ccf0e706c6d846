"""The module calls of a trace: who called which module, with what, and what came back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from torch import fx

from surgery.capture.values import is_proxy
from surgery.capture.where import Where


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module while a forward was traced.

    Attributes:
        path: Dotted path of the module that was called; the first one of a shared module.
        owner: Dotted path of the module whose forward made the call.
        where: ``file:line`` of the statement that made it.
        args: Positional arguments, in their nesting: the graph's node for a tensor, None for
            anything else.
        kwargs: The same for the keyword arguments.
        result: The same for what came back; a dataclass is a dict of its fields.
    """

    path: str
    owner: str
    where: Where
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


def call_nodes(value: Any) -> Any:
    """The nodes of the tensors in a nested value, in its nesting; anything else is None."""
    if is_proxy(value):
        return cast(fx.Node, value.node)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {str(key): call_nodes(item) for key, item in items}
    if isinstance(value, (tuple, list)):
        return tuple(call_nodes(item) for item in cast(tuple[Any, ...], value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: call_nodes(getattr(value, field.name)) for field in fields}
    return None
