"""What a rule could name in a model: its sites with type, role, shape and place, and its stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from surgery.errors import CaptureError, SourceError
from surgery.select import ModelMap, Role, Site, Stack
from surgery.table import collapse, render

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class SiteView:
    """One site as a rule sees it.

    Attributes:
        path: What ``path`` is compared with.
        type: Name of its class; what ``type`` is compared with, base classes aside.
        roles: What ``role`` is compared with; empty if no role could be told.
        role_reason: The evidence for the roles, or why there are none.
        slices: Of a fused projection, part → its output features as (start, stop) or a list.
        shape: What ``shape`` is compared with; empty for a site without a weight.
        stack: Path of the stack it lies in, or None.
        layer: Index of its layer in that stack, or None.
        created_by: Id of the rule that made it, or None.
    """

    path: str
    type: str
    roles: tuple[str, ...]
    role_reason: str
    slices: Mapping[str, Any]
    shape: Mapping[str, int]
    stack: str | None
    layer: int | None
    created_by: str | None


@dataclass(frozen=True)
class Inspection:
    """What a rule could name. ``print(inspection)`` shows it as a table.

    Attributes:
        model: Name of the model's class.
        sites: Every site, in module order.
        stacks: Every stack.
        untraced: Why no roles are known, or None if the model was traced.
    """

    model: str
    sites: tuple[SiteView, ...]
    stacks: tuple[Stack, ...]
    untraced: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data, every site listed."""
        return {
            "model": self.model,
            "sites": [asdict(site) for site in self.sites],
            "stacks": [asdict(stack) for stack in self.stacks],
            "untraced": self.untraced,
        }

    def view(self, *, full: bool = False) -> Group:
        """The inspection for a rich console.

        Args:
            full: One row per site, those without a weight too, instead of one row per run of
                like sites that have one.
        """
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("site", "type", "role", "in → out", "stack", title=self.model)
        for rows in self._rows(full=full):
            first = rows[0]
            paths = collapse([site.path for site in rows])
            cells = (paths, first.type, _role_cell(first), _shape_cell(first), first.stack or "")
            table.add_row(*map(Text, cells))
        lines = [
            f"stack {stack}: {len(stack)} x {stack.type}, layers 0..{len(stack) - 1}"
            for stack in self.stacks
        ]
        if not full:
            hidden = sum(1 for site in self.sites if not site.shape)
            lines.append(f"{hidden} sites without a weight can be named too: --full lists them")
        if self.untraced is not None:
            lines.append(f"no roles: {self.untraced}")
        return Group(table, *map(Text, lines))

    def __rich__(self) -> Group:
        return self.view()

    def __str__(self) -> str:
        return render(self.view())

    def _rows(self, *, full: bool) -> Sequence[Sequence[SiteView]]:
        """Sites that make one row: alike but for the numbers in their paths."""
        if full:
            return [[site] for site in self.sites]
        rows: dict[tuple[object, ...], list[SiteView]] = {}
        for site in self.sites:
            if not site.shape:
                continue
            pattern = ".".join("#" if part.isdigit() else part for part in site.path.split("."))
            like = (pattern, site.type, site.roles, tuple(site.shape.items()), site.stack)
            rows.setdefault(like, []).append(site)
        return list(rows.values())


def inspect(model: nn.Module, *, example: Any = None) -> Inspection:
    """List what a rule could name in a model. Changes nothing.

    Args:
        model: Any ``nn.Module``.
        example: A tensor, a tuple of positional or a dict of keyword arguments, or an
            ``Example``; inferred where the model carries a config. Without one that fits, or
            where the model cannot be traced, ``untraced`` says why no roles are known, and
            everything else is listed.
    """
    known = ModelMap(model, example)
    untraced = _why_untraced(known)
    sites = tuple(_seen(known, site, untraced) for site in known.sites)
    return Inspection(type(model).__name__, sites, tuple(known.stacks), untraced)


def _why_untraced(known: ModelMap) -> str | None:
    try:
        _ = known.roles
    except (CaptureError, SourceError) as error:
        return error.message
    return None


def _seen(known: ModelMap, site: Site, untraced: str | None) -> SiteView:
    role = known.role(site) if untraced is None else Role(None, untraced)
    position = known.position(site)
    return SiteView(
        path=site.path,
        type=site.what,
        roles=role.names,
        role_reason=role.reason,
        slices=role.slices,
        shape=site.sizes,
        stack=None if position is None else position[0].path,
        layer=None if position is None else position[1],
        created_by=site.created_by,
    )


def _role_cell(site: SiteView) -> str:
    return ", ".join(site.roles) if site.roles else "-"


def _shape_cell(site: SiteView) -> str:
    if "in" in site.shape:
        return f"{site.shape['in']} → {site.shape['out']}"
    return "" if not site.shape else f"{site.shape['numel']} elements"
