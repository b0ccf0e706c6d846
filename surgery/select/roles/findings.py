"""Roles by site while they are being found, and what the finders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from surgery.select.roles.dataflow import Dataflow
from surgery.select.roles.features import as_features
from surgery.select.roles.role import Features, Role

SiteOf = Callable[[str], str]
"""The site that a parameter belongs to."""


@dataclass
class Findings:
    """Roles by site: in the order found, which is the order of their strength."""

    names: dict[str, dict[str, str]] = field(default_factory=dict[str, "dict[str, str]"])
    slices: dict[str, dict[str, Features]] = field(default_factory=dict[str, "dict[str, Features]"])
    unresolved: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, site: str, name: str, reason: str) -> None:
        """Note that a site plays a role; what was noted first stays."""
        self.names.setdefault(site, {}).setdefault(name, reason)

    def has(self, site: str, *groups: str) -> bool:
        """Whether a site has a role, one of the given groups if any are given."""
        names = self.names.get(site, {})
        return any(not groups or name.partition(".")[0] in groups for name in names)

    def roles(self) -> dict[str, Role]:
        """What was found, by site."""
        found = {site: Role(None, reason) for site, reason in self.unresolved.items()}
        for site, names in self.names.items():
            first, *also = names
            reason = "; ".join(names.values())
            slices = sorted(self.slices.get(site, {}).items(), key=_first_feature)
            found[site] = Role(first, reason, dict(slices), tuple(also))
        return found


def steering(flow: Dataflow) -> set[int]:
    """The uses of weights that scale or shift states."""
    return set[int]().union(*flow.evidence.modulators.values())


def other_features(taken: Iterable[Features], size: int) -> Features:
    """The features that none of ``taken`` has."""
    used = {i for part in taken for i in (range(*part) if isinstance(part, tuple) else part)}
    return as_features(index for index in range(size) if index not in used)


def _first_feature(part: tuple[str, Features]) -> int:
    return next(iter(part[1]), 0)
