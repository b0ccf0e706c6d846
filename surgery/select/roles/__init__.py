"""Roles of layers, resolved from the dataflow of a traced forward."""

from __future__ import annotations

from surgery.select.roles.resolve import resolve_roles
from surgery.select.roles.role import Role

__all__ = ["Role", "resolve_roles"]
