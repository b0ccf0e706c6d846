"""Who uses a weight: the modules that share it, each with the host that fits it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from torch import nn

from surgery.capture.graft import stock_class
from surgery.errors import Conflict
from surgery.passes.hosts.code import reads_of_children
from surgery.passes.hosts.hosting import Hosting, hosting_of
from surgery.select import Site
from surgery.select.sites import is_layer
from surgery.tree import named_modules, own_parameters


@dataclass(frozen=True)
class Use:
    """One module's use of a weight.

    Attributes:
        path: Path of the module.
        module: The module.
        bare: Whether the weight is a parameter of a module that is no single layer.
        hosting: How the module can carry adapters.
    """

    path: str
    module: nn.Module
    bare: bool
    hosting: Hosting


class Uses:
    """The uses of every weight of a model, found in one walk over it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[tuple[int, str], Hosting | str] = {}

    def of(self, site: Site) -> tuple[Use, ...]:
        """Every use of a site's weight, in module order.

        Raises:
            Conflict: a use of the weight has no host, or two read it in different ways.
        """
        own = self._use(site.path, site.module, site.parameter)
        weight = own_parameters(site.module).get(own.hosting.parameter)
        sharers = [] if weight is None else self._sharers.get(id(weight), [])
        if len(sharers) < 2:
            return (own,)
        uses = tuple(
            self._use(path, module, None if is_layer(module) else name)
            for path, module, name in sharers
        )
        odd = next((use for use in uses if use.hosting.matrix != own.hosting.matrix), None)
        if odd is not None:
            raise Conflict(
                f"{site.path} shares its weight with {odd.path}, which reads it the other way "
                "round, so one adapter cannot serve both",
                hint="untie the weight first, or leave it out with except:",
            )
        return uses

    def _use(self, path: str, module: nn.Module, parameter: str | None) -> Use:
        holder = path if parameter is None else path.removesuffix(parameter).rstrip(".")
        key = (id(module), parameter or "")
        if key not in self._known:
            outside = f"{holder}.{parameter or 'weight'}" in self._read_outside
            self._known[key] = hosting_of(module, parameter, read_outside=outside)
        found = self._known[key]
        if isinstance(found, str):
            raise Conflict(f"the weight of {path} cannot be adapted: {found}")
        return Use(holder, module, parameter is not None, found)

    @cached_property
    def _sharers(self) -> dict[int, list[tuple[str, nn.Module, str]]]:
        """Identity of a parameter → every (module path, module, name) that holds it."""
        found: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, module in named_modules(self._model, duplicates=False):
            for name, parameter in own_parameters(module).items():
                found.setdefault(id(parameter), []).append((path, module, name))
        return found

    @cached_property
    def _read_outside(self) -> frozenset[str]:
        """Full names of the parameters that the forward of another module computes with."""
        holders = list(named_modules(self._model))
        names = frozenset(name for _, module in holders for name in own_parameters(module))
        found: set[str] = set()
        for path, module in holders:
            prefix = f"{path}." if path else ""
            for chain in _read_by(stock_class(module), names):
                found.add(prefix + chain)
        return frozenset(found)


@cache
def _read_by(cls: type[nn.Module], names: frozenset[str]) -> frozenset[str]:
    """Names, relative to a module of a class, of its descendants' parameters it computes with."""
    return frozenset(f"{chain}.{name}" for name in names for chain in reads_of_children(cls, name))
