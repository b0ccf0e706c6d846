"""The facts about a model that rules ask for, each found once, when first asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import nn

from surgery.capture import Trace, trace_model
from surgery.errors import CaptureError
from surgery.record import record_of
from surgery.residuals import Findings, examine
from surgery.select.roles import Role, resolve_roles
from surgery.select.sites import Site, bare_parameters, is_layer, own_parameters, walk
from surgery.select.stacks import Stack, find_stacks, stacks_inside
from surgery.sources.examples import Example

Position = tuple[Stack, int]


class ModelMap:
    """Sites, stacks and roles of one model.

    Only roles need the model to be traced, hence an example input; all else is read off the
    module tree. The model is never changed.

    Args:
        model: The model, on any device.
        example: What to call it with: a tensor, a tuple, a dict or an ``Example``. Inferred from
            the model's configuration when a role is asked for and none was given.
    """

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        self.model = model
        self.example = example
        self._created: dict[str, str] = {}
        self._base: ModelMap | None = None

    def with_created(self, rule: str, names: Iterable[str]) -> ModelMap:
        """The same model after a planned rule: the tensors it will make are sites too.

        Args:
            rule: Id of the rule.
            names: Full dotted names of the tensors.
        """
        later = ModelMap(self.model, self.example)
        later._base = self if self._base is None else self._base
        later._created = {**self._created, **dict.fromkeys(names, rule)}
        return later

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every module and every parameter outside a layer, in module order, each once."""
        if self._base is None:
            return tuple(self._found_sites)
        planned = (self._planned_site(name, rule) for name, rule in self._created.items())
        return (*self._base.sites, *planned)

    @cached_property
    def by_path(self) -> Mapping[str, Site]:
        """Sites by path; a shared module under each of its paths."""
        found = {site.path: site for site in self.sites}
        aliases = {path: found[first] for path, first in self._first_paths.items()}
        return {**aliases, **found}

    def aliases(self, site: Site) -> tuple[str, ...]:
        """Every path of a site, its own first; more than one if the module is shared."""
        return (site.path, *self._shared.get(site.path, ()))

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of the model; see ``surgery.select.stacks``."""
        return find_stacks(self.model) if self._base is None else self._base.stacks

    @cached_property
    def all_stacks(self) -> tuple[Stack, ...]:
        """Stacks and those inside their layers, which a rule can name by path."""
        if self._base is not None:
            return self._base.all_stacks
        return (*self.stacks, *stacks_inside(self.model, self.stacks))

    @cached_property
    def largest(self) -> Stack | None:
        """The stack with the most layers; of equals the one with the most parameters."""
        if self._base is not None:
            return self._base.largest
        return max(self.stacks, key=self._weigh, default=None)

    def position(self, site: Site) -> Position | None:
        """The stack a site lies in and the index of its layer, or None if it lies in none."""
        return self.position_in(self._layer_index, site)

    def index(self, stacks: Iterable[Stack]) -> Mapping[str, Position]:
        """Path of every layer of some stacks → its stack and its index in it."""
        return {path: (stack, at) for stack in stacks for at, path in enumerate(stack.layers)}

    def position_in(self, index: Mapping[str, Position], site: Site) -> Position | None:
        """As ``position``, among the layers of ``index``."""
        path = site.path
        while path:
            if path in index:
                return index[path]
            path = path.rpartition(".")[0]
        return None

    def role(self, site: Site) -> Role:
        """The role a site plays, or why none could be told.

        Raises:
            SourceError: there is no example and none can be inferred.
            CaptureError: the model cannot be traced.
        """
        if site.created_by is not None:
            return Role(None, f"it was made by rule {site.created_by!r}")
        if site.path in self.roles:
            return self.roles[site.path]
        return Role(None, self._why_no_role(site))

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """Path of every site that the traced forward uses → its role."""
        if self._base is not None:
            return self._base.roles
        return resolve_roles(self.model, self.trace)

    @cached_property
    def trace(self) -> Trace:
        """The model's forward on the example, as one graph; made once for all who ask.

        Raises:
            SourceError: there is no example and none can be inferred.
            CaptureError: the model cannot be traced.
        """
        if self._base is not None:
            return self._base.trace
        try:
            return trace_model(self.model, self.resolved_example.args, self.resolved_example.kwargs)
        except CaptureError as error:
            inferred = "" if self.example is not None else ", which was inferred"
            shapes = ", ".join(str(list(t.shape)) for t in self.resolved_example.tensors())
            raise CaptureError(
                error.message,
                hint=f"if the model cannot be called with the example{inferred} (tensors of "
                f"{shapes}), pass another: example=",
            ) from error

    @cached_property
    def residuals(self) -> Findings:
        """The residual additions of the traced forward, and why other additions are none."""
        if self._base is not None:
            return self._base.residuals
        return examine(self.trace.graph, self.model)

    @cached_property
    def resolved_example(self) -> Example:
        """What the model is called with: the example that was given, or one that fits its config.

        Raises:
            SourceError: none was given and none can be inferred.
        """
        if self._base is not None:
            return self._base.resolved_example
        if self.example is not None:
            given = Example.coerce(self.example)
            devices = {tensor.device.type for tensor in self.model.parameters()}
            # Only shapes matter on meta, where nobody thinks of moving an example.
            return given.to("meta") if devices == {"meta"} else given
        from surgery.sources import infer_example

        return infer_example(self.model)

    def _why_no_role(self, site: Site) -> str:
        if site.parameter is None and not is_layer(site.module):
            return "it holds other modules; roles belong to the layers inside"
        if site.weight is None:
            return "it has no weight"
        return "the example's forward does not use it"

    @cached_property
    def _found_sites(self) -> Iterable[Site]:
        record = record_of(self.model)
        made = {} if record is None else {n: e.rule for e in record.edits for n in e.adds}
        return [site for path, module in self._first_modules for site in _sites(path, module, made)]

    @cached_property
    def _first_modules(self) -> list[tuple[str, nn.Module]]:
        return [item for item in self._walked if self._first_paths.get(item[0]) is None]

    @cached_property
    def _walked(self) -> list[tuple[str, nn.Module]]:
        return list(walk(self.model))

    @cached_property
    def _first_paths(self) -> Mapping[str, str]:
        """Path of a module met before under another path → that first path."""
        if self._base is not None:
            return self._base._first_paths
        first: dict[int, str] = {}
        later: dict[str, str] = {}
        for path, module in self._walked:
            known = first.setdefault(id(module), path)
            if known != path:
                later[path] = known
        return later

    @cached_property
    def _shared(self) -> Mapping[str, tuple[str, ...]]:
        shared: dict[str, tuple[str, ...]] = {}
        for path, first in self._first_paths.items():
            shared[first] = (*shared.get(first, ()), path)
        return shared

    @cached_property
    def _layer_index(self) -> Mapping[str, Position]:
        return self.index(self.stacks)

    def _weigh(self, stack: Stack) -> tuple[int, int]:
        modules = (self.model.get_submodule(path) for path in stack.layers)
        return len(stack), sum(p.numel() for module in modules for p in module.parameters())

    def _planned_site(self, name: str, rule: str) -> Site:
        """The site of a tensor that does not exist yet, held by the nearest module that does."""
        holder = name
        while holder not in self.by_module:
            holder = holder.rpartition(".")[0]
        return Site(name, self.by_module[holder], name.removeprefix(f"{holder}."), rule)

    @cached_property
    def by_module(self) -> Mapping[str, nn.Module]:
        """Every path of every module of the model as it is."""
        return dict(self._walked) if self._base is None else self._base.by_module


def _sites(path: str, module: nn.Module, made: Mapping[str, str]) -> Iterable[Site]:
    prefix = f"{path}." if path else ""
    own = own_parameters(module)
    makers = {made.get(prefix + name) for name in own} if made and own else {None}
    # A module is a rule's work if all that it holds is.
    yield Site(path, module, None, makers.pop() if len(makers) == 1 else None)
    for name in bare_parameters(module):
        yield Site(prefix + name, module, name, made.get(prefix + name))
