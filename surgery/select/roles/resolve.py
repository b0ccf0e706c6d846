from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from surgery.select.roles.role import Role
from surgery.sources.examples import Example


def resolve_roles(model: nn.Module, example: Example) -> Mapping[str, Role]:
    raise NotImplementedError
