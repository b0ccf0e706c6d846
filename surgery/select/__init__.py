"""From selectors to sites: what a rule can name in a model, and what it does name."""

from __future__ import annotations

from surgery.select.match import Match
from surgery.select.model_map import ModelMap
from surgery.select.questions import stacks_meant
from surgery.select.roles import Role
from surgery.select.selection import Selection, select
from surgery.select.sites import Site
from surgery.select.stacks import Stack

__all__ = ["Match", "ModelMap", "Role", "Selection", "Site", "Stack", "select", "stacks_meant"]
