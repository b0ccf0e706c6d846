"""What a rule could name in a model: its sites, its stacks and its residual additions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from surgery.errors import CaptureError, SourceError
from surgery.residuals import Findings, examine, place, residual_stacks
from surgery.select import ModelMap, Role, Site, Stack
from surgery.table import collapse, render

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

T = TypeVar("T")


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
class ResidualView:
    """One residual addition.

    Attributes:
        owner: Path of the module whose forward performs it.
        kind: What happens to the shortcut before it is added: identity, cast, scaled, pooled or
            projection.
        shape: Shape of the sum at the example.
        dtype: Its type.
        shortcut: Name of the graph's node that is added as the shortcut.
        source: Name of the node that the shortcut was cast, scaled, pooled or projected from.
        branches: Names of the nodes that are added to it; several for parallel branches.
        block: Path of the innermost module whose call contains all of the branches.
        stack: Path of the stack it lies in, or None.
        layer: Index of its layer in that stack, or None.
        run: Index of the run of residuals it belongs to, through which the state keeps its shape.
        where: ``file:line``.
        in_place: Whether it writes to one of its operands.
    """

    owner: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    shortcut: str
    source: str
    branches: tuple[str, ...]
    block: str
    stack: str | None
    layer: int | None
    run: int
    where: str
    in_place: bool


@dataclass(frozen=True)
class AdditionView:
    """One addition that is not residual although its terms have to do with each other.

    Attributes:
        owner: Path of the module whose forward performs it.
        reason: Why it is not residual.
        where: ``file:line``.
    """

    owner: str
    reason: str
    where: str


@dataclass(frozen=True)
class Inspection:
    """What a rule could name. ``print(inspection)`` shows it as a table.

    Attributes:
        model: Name of the model's class.
        sites: Every site, in module order.
        stacks: Every stack.
        untraced: Why no roles and residuals are known, or None if the model was traced.
        residuals: Every residual addition, in the order they run.
        additions: Additions that came close to being residual, in the order they run.
    """

    model: str
    sites: tuple[SiteView, ...]
    stacks: tuple[Stack, ...]
    untraced: str | None
    residuals: tuple[ResidualView, ...] = ()
    additions: tuple[AdditionView, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data, every site listed."""
        return {
            "model": self.model,
            "sites": [asdict(site) for site in self.sites],
            "stacks": [asdict(stack) for stack in self.stacks],
            "untraced": self.untraced,
            "residuals": [asdict(residual) for residual in self.residuals],
            "additions": [asdict(addition) for addition in self.additions],
        }

    def view(self, *, full: bool = False) -> Group:
        """The inspection for a rich console.

        Args:
            full: One row per site and per residual, sites without a weight too, instead of one
                row per run of like ones; and the additions that are not residual.
        """
        from rich.console import Group
        from rich.text import Text

        lines = [
            f"stack {stack}: {len(stack)} x {stack.type}, layers 0..{len(stack) - 1}"
            for stack in self.stacks
        ]
        if not full:
            hidden = sum(1 for site in self.sites if not site.shape)
            lines.append(f"{hidden} sites without a weight can be named too: --full lists them")
        if self.untraced is not None:
            lines.append(f"no roles and residuals: {self.untraced}")
        return Group(
            self._site_table(full=full), *map(Text, lines), *self._residual_part(full=full)
        )

    def _site_table(self, *, full: bool) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table("site", "type", "role", "in → out", "stack", title=self.model)
        for rows in self._rows(full=full):
            first = rows[0]
            paths = collapse([site.path for site in rows])
            cells = (paths, first.type, _role_cell(first), _shape_cell(first), first.stack or "")
            table.add_row(*map(Text, cells))
        return table

    def _residual_part(self, *, full: bool) -> Iterable[RenderableType]:
        from rich.text import Text

        if self.untraced is not None:
            return
        yield Text()
        if self.residuals:
            yield self._residual_table(full=full)
            yield Text(self._runs())
        else:
            yield Text("no residual additions")
        if full:
            yield from map(Text, self._why_not())
        elif self.additions:
            more = _counted(len(self.additions), "other addition")
            yield Text(f"{more} that came close: --full gives the reasons")

    def _residual_table(self, *, full: bool) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="residual additions")
        table.add_column("n", justify="right")
        table.add_column("stack  block > module that adds", overflow="fold")
        for name in ("kind", "shape", "line"):
            table.add_column(name, no_wrap=True)
        one_each = [[residual] for residual in self.residuals]
        for rows in one_each if full else _alike(self.residuals, _likeness):
            first = rows[0]
            branches = len(first.branches)
            kind = first.kind if branches == 1 else f"{first.kind}, {branches} branches"
            shape, line = _times(first.shape), _short(first.where)
            cells = (str(len(rows)), _adder(rows), kind, shape, line)
            table.add_row(*map(Text, cells))
        return table

    def _runs(self) -> str:
        """How many residuals follow each other at which shape."""
        runs = _alike(self.residuals, lambda residual: residual.run)
        lengths = _alike(runs, lambda run: (len(run), run[0].shape))
        told = ", ".join(
            ("" if len(like) == 1 else f"{len(like)} x ")
            + f"{len(like[0])} at {_times(like[0][0].shape)}"
            for like in lengths
        )
        return f"{_counted(len(self.residuals), 'residual addition')}; runs of one shape: {told}"

    def _why_not(self) -> Iterable[str]:
        for rows in _alike(self.additions, lambda each: (_pattern(each.owner), each.where)):
            owners = _common([row.owner or "(the model)" for row in rows])
            yield f"not residual: {owners}, {_short(rows[0].where)}: {rows[0].reason}"

    def __rich__(self) -> Group:
        return self.view()

    def __str__(self) -> str:
        return render(self.view())

    def _rows(self, *, full: bool) -> Sequence[Sequence[SiteView]]:
        """Sites that make one row: alike but for the numbers in their paths."""
        if full:
            return [[site] for site in self.sites]
        weighted = [site for site in self.sites if site.shape]
        return _alike(
            weighted,
            lambda site: (
                *(_pattern(site.path), site.type, site.roles),
                *(tuple(site.shape.items()), site.stack),
            ),
        )


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
    stacks = tuple(known.stacks)
    if untraced is not None:
        return Inspection(type(model).__name__, sites, stacks, untraced)
    found = examine(known.trace.graph, model)
    return Inspection(
        model=type(model).__name__,
        sites=sites,
        stacks=stacks,
        untraced=None,
        residuals=tuple(_residual_views(known, found)),
        additions=tuple(AdditionView(each.owner, each.reason, each.where) for each in found.near),
    )


def _why_untraced(known: ModelMap) -> str | None:
    try:
        _ = known.roles
    except (CaptureError, SourceError) as error:
        return error.message
    return None


def _residual_views(known: ModelMap, found: Findings) -> Iterable[ResidualView]:
    layers = known.index(known.stacks)
    runs = residual_stacks(found.residuals)
    run_of = {site: at for at, run in enumerate(runs) for site in run.sites}
    for residual in found.residuals:
        position = place(residual, layers)
        yield ResidualView(
            owner=residual.owner,
            kind=residual.kind,
            shape=residual.shape,
            dtype=str(residual.dtype).removeprefix("torch."),
            shortcut=residual.shortcut.name,
            source=residual.source.name,
            branches=tuple(branch.name for branch in residual.branches),
            block=residual.block,
            stack=None if position is None else str(position[0]),
            layer=None if position is None else position[1],
            run=run_of[residual],
            where=residual.where,
            in_place=residual.in_place,
        )


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


def _alike(items: Iterable[T], likeness: Callable[[T], object]) -> list[list[T]]:
    """Items that make one row, in the order of the first of each."""
    rows: dict[object, list[T]] = {}
    for item in items:
        rows.setdefault(likeness(item), []).append(item)
    return list(rows.values())


def _pattern(path: str) -> str:
    """A path without its numbers."""
    return ".".join("#" if part.isdigit() else part for part in path.split("."))


def _likeness(residual: ResidualView) -> object:
    owner, block = _pattern(residual.owner), _pattern(residual.block)
    parallel = len(residual.branches) > 1
    place = (residual.stack, residual.where, residual.shape)
    return owner, block, residual.kind, parallel, *place


def _adder(rows: Sequence[ResidualView]) -> str:
    """The blocks of some residuals within their stack, and the modules in them that add."""
    stack = rows[0].stack
    blocks = _common([row.block for row in rows])
    owners = _common([row.owner for row in rows])
    inner = owners.removeprefix(f"{blocks}.") if blocks and owners != blocks else ""
    if stack is not None and blocks.startswith(f"{stack}."):
        blocks = f"{stack}  {blocks.removeprefix(f'{stack}.')}"
    return f"{blocks} > {inner}" if inner else blocks or owners or "(the model)"


def _common(paths: Sequence[str]) -> str:
    """Paths that differ in numbers only, as one."""
    return collapse(list(dict.fromkeys(paths))).partition("  (")[0]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _short(where: str) -> str:
    """The file's name and the line."""
    return where.rpartition("/")[2]


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
