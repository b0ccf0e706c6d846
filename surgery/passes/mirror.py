"""A learned mirror map between the parameters that are trained and those that are computed with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from architectures.adapters import Method
from architectures.mirror import MirrorMap
from surgery.errors import Conflict, ModelStateError, RuleError
from surgery.passes.base import ApplyContext, Pass, PlanContext
from surgery.passes.duals import (
    Attachment,
    Mirrors,
    attach,
    check_carrier,
    check_free,
    detach,
    elsewhere,
    mirrors_of,
)
from surgery.passes.hosts import bank_of, is_plain
from surgery.passes.links import MAPS, is_mapped
from surgery.passes.methods import completed, known_map, map_named, method_named, tupled
from surgery.record import Contract, Edit, TensorSpec, record_of
from surgery.rules import Where, options
from surgery.select import Match, ModelMap, Site
from surgery.select.sites import is_layer, own_children
from surgery.table import human_count, some
from surgery.tree import (
    children,
    joined,
    named_modules,
    named_parameters,
    own_buffers,
    own_parameters,
)


@options
class Mirror(Pass):
    """Contract ``exact``: a map starts as the identity.

    Puts a mirror map over parameters: they become duals, which keep their names and are what an
    inner loop steps on, and the model computes with what the map makes of them. The map's own
    parameters are what is meta-learned. Without a ``where`` every parameter of the model is mapped.

    Args:
        map: Name of the map; ``surgery list maps`` shows them.
        parameters: Which parameters of the selected layers, by the last part of their names, such
            as ``[weight]``, or ``[lora_A, lora_B]`` for those of adapters; by default all that the
            layers came with.
        dtype: Of the map's parameters, which is what it computes in; by default that of the
            mapped ones, float32 at least.
        freeze: What stops requiring gradients: the ``rest`` of the stock model, which no rule
            maps, or ``none``. No other rule freezes what is mapped, before or after this one.
        options: Options of the map's own, such as ``{blocks: 4, shrink: [2, 2, 2]}``;
            docs/mirror.md lists them.
    """

    name: ClassVar[str] = "mirror"
    settled_by: ClassVar[str] = (
        "freeze the maps first, with surgery.apply(model, Rule(surgery.Freeze()))"
    )

    map: Annotated[str, AfterValidator(known_map)] = "diagonal"
    parameters: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    dtype: Literal["float64", "float32"] | None = None
    freeze: Literal["rest", "none"] = "none"
    # Validated when it is a default too: a rule is written back with every option of its map.
    options: Mapping[str, Any] = Field(default_factory=dict[str, Any], validate_default=True)

    @field_validator("options")
    @classmethod
    def _complete_options(cls, value: Mapping[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Every option of the map. Skipped where there is no such map."""
        name = info.data.get("map")
        if name is None:
            return dict(value)
        return completed("map", name, map_named(name).Options, value)

    @property
    def kind(self) -> type[MirrorMap]:
        """The map."""
        return map_named(self.map)

    @property
    def made_with(self) -> Any:
        """The map's own options, as an instance of its ``Options``."""
        return self.kind.Options(**tupled(self.options))

    def accepts(self, site: Site) -> Match:
        """Whether the site has parameters that a map can take."""
        if is_parametrized(site.module):
            return Match.no("a parametrization computes what it has already")
        if site.created_by is not None and not _exists(site):
            return Match.yes("it will be a parameter")
        if site.parameter is None and not is_layer(site.module):
            return Match.no(
                "it is no single layer; its parameters and the layers inside are sites of their own"
            )
        found = self._found(site)
        if not found:
            wanted = "" if self.parameters is None else f" called {' or '.join(self.parameters)}"
            return Match.no(f"it has no parameter{wanted}")
        for _, module, name in found:
            why = _unsuited(module, name)
            if why is not None:
                return Match.no(why)
        return Match.yes(f"its {' and '.join(name for *_, name in found)} can be mapped")

    def chooser(self, sites: ModelMap, where: Where | None) -> Callable[[Site], Match]:
        """``accepts``, save for what belongs to a map itself."""
        inside = {
            id(module)
            for _, mirrors in named_modules(sites.model, duplicates=False)
            if isinstance(mirrors, Mirrors)
            for _, module in named_modules(mirrors, duplicates=False)
        }

        def accepts(site: Site) -> Match:
            if id(site.module) in inside:
                return Match.no("it is a part of a mirror map")
            return self.accepts(site)

        return accepts

    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        """One edit for all sites if the map couples them, else one for each module."""
        members = list(self._members(sites, context))
        _check_storage(members, context)
        _check_values(members)
        check_carrier(context.model, "")
        for member in members:
            _check_others(member, context)
        if self.kind.couples:
            check_free(context.model, "")
            _check_devices(members)
            return [self._edit(members, [(members, "", _number(context))], context)]
        alone: dict[str, list[_Member]] = {}
        for member in members:
            alone.setdefault(member.path, []).append(member)
        return [
            self._edit(together, [([each], path, each.parameter) for each in together], context)
            for path, together in alone.items()
        ]

    def may_idle(self, edit: Edit) -> bool:
        """Yes: it scales parameters, which are often zero, and encoders end with a ReLU."""
        return True

    def trains(self, edit: Edit) -> Mapping[str, str]:
        """The duals, until their map is baked in."""
        found: dict[str, str] = {}
        for made in edit.payload["maps"]:
            start = f"{_prefix(made)}."
            own = [name for name in edit.adds if name.startswith(start)]
            found.update(
                (joined(path, name), by) for path, name in made["members"] for by in own[:1]
            )
        return found

    def warnings(self, edits: Sequence[Edit], context: PlanContext) -> Sequence[str]:
        """That duals are frozen, and that the maps have more parameters than what they map."""
        return [*_frozen_duals(edits, context), *self._too_large(edits)]

    def _too_large(self, edits: Sequence[Edit]) -> Sequence[str]:
        added = sum(spec.numel for edit in edits for spec in edit.adds.values())
        below = sum(math.prod(shape) for edit in edits for shape in _shapes(edit))
        if added <= below:
            return ()
        text = (
            f"the {self.map} maps have {human_count(added)} parameters, {added / below:.3g} times "
            f"the {human_count(below)} that they map; {self._way_out()}"
        )
        return (text,)

    def frozen(
        self, model: nn.Module, edits: Sequence[Edit], spared: AbstractSet[str]
    ) -> Iterable[str]:
        """Every stock parameter that no rule maps, or none."""
        if self.freeze == "none":
            return ()
        each_once = named_parameters(model, duplicates=False)
        return [name for name, _ in each_once if name not in spared]

    def check_revertible(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Raise if a map is gone, or a module was wrapped since."""
        for made in edit.payload["maps"]:
            mirrors = mirrors_of(context.module(model, made["holder"]))
            if mirrors is not None and made["key"] in children(mirrors):
                continue
            if not _was_baked(model, edit):
                raise ModelStateError(
                    f"{edit.site} no longer has its mirror map",
                    hint="it was removed by other means than surgery.undo",
                )
        for path, _ in _places(edit):
            check_carrier(context.module(model, path), path)
        check_carrier(model, "")

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Build the maps and have the parameters read through them."""
        done: list[Mapping[str, Any]] = []
        for path, _ in _places(edit):
            check_carrier(context.module(model, path), path)
        check_carrier(model, "")
        try:
            for made in edit.payload["maps"]:
                self.put(model, edit, made, context)
                done.append(made)
        except BaseException:
            for made in reversed(done):
                detach(model, context.module(model, made["holder"]), made["key"])
            raise

    def put(
        self, model: nn.Module, edit: Edit, made: Mapping[str, Any], context: ApplyContext
    ) -> Attachment:
        """Build one map of an edit and have its parameters read through it.

        Args:
            model: The model.
            edit: The edit.
            made: What its payload says of the map.
            context: Of the application.
        """
        holder = context.module(model, made["holder"])
        members = tuple((context.module(model, path), name) for path, name in made["members"])
        attachment = Attachment(self._build(edit, made, members, context), members)
        attach(model, holder, made["key"], attachment)
        return attachment

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Take the maps away; the parameters keep the values that they have as duals."""
        for made in reversed(edit.payload["maps"]):
            detach(model, context.module(model, made["holder"]), made["key"])

    def begin(self, model: nn.Module, edit: Edit, context: ApplyContext) -> Edit:
        """Give maps that were put in on the meta device their first values."""
        for made in edit.payload["maps"]:
            mirrors = cast("Mirrors", mirrors_of(context.module(model, made["holder"])))
            with context.generator(_prefix(made)) as generator:
                cast("MirrorMap", children(mirrors)[made["key"]]).start(generator)
        return edit

    def baked(self, model: nn.Module, edit: Edit, context: ApplyContext) -> bool:
        """Whether the maps were frozen: the parameters hold what the model computes with then."""
        return not any(_is_there(model, made, context) for made in edit.payload["maps"])

    # -- planning ------------------------------------------------------------------------------

    def _found(self, site: Site) -> list[tuple[str, nn.Module, str]]:
        """Path of the module, module and name of each parameter of a site that the rule means.

        A rule that names its ``parameters`` means those of what earlier rules added to a layer,
        too, such as the factors of its adapters.
        """
        if site.parameter is not None:
            path = site.path.removesuffix(site.parameter).rstrip(".")
            return [(path, site.module, site.parameter)] if self._means(site.parameter) else []
        stock = [(site.path, site.module)]
        added = [] if self.parameters is None else list(_added(site))
        return [
            (path, module, name)
            for path, module in (*stock, *added)
            for name in own_parameters(module)
            if self._means(name)
        ]

    def _means(self, name: str) -> bool:
        return self.parameters is None or name.rpartition(".")[2] in self.parameters

    def _members(self, sites: Sequence[Site], context: PlanContext) -> Iterator[_Member]:
        """The parameters of some sites, each once."""
        planned = {name: spec for edit in context.earlier for name, spec in edit.adds.items()}
        seen: set[str] = set()
        for site in sites:
            for member in self._of_site(site, planned):
                if member.name not in seen:
                    seen.add(member.name)
                    yield member

    def _of_site(self, site: Site, planned: Mapping[str, TensorSpec]) -> Iterator[_Member]:
        if not _exists(site):
            path, _, name = site.path.rpartition(".")
            spec = planned[site.path]
            if self._means(name) and spec.trainable:
                yield _Member(path, name, spec.shape, spec.torch_dtype, None, None)
            return
        for path, module, name in self._found(site):
            tensor = own_parameters(module)[name]
            yield _Member(path, name, tuple(tensor.shape), tensor.dtype, module, tensor)

    def _edit(
        self,
        members: Sequence[_Member],
        maps: Sequence[tuple[Sequence[_Member], str, str]],
        context: PlanContext,
    ) -> Edit:
        dtype = self._dtype(members)
        adds: dict[str, TensorSpec] = {}
        payload: list[dict[str, Any]] = []
        for mapped, holder, key in maps:
            owners: dict[str, int] = {}
            made = {
                "holder": holder,
                "key": key,
                "members": [[each.path, each.parameter] for each in mapped],
                "shapes": [list(each.shape) for each in mapped],
                "owners": [owners.setdefault(each.path, len(owners)) for each in mapped],
            }
            payload.append(made)
            adds.update(self._specs(made, dtype))
        return Edit(
            rule=context.rule,
            pass_name=self.name,
            site=_site(members),
            summary=self._summary(len(members)),
            adds=adds,
            uses={
                **{each.name: "extend" for each in members},
                **{f"the mirror map of {each.name}": "replace" for each in members},
            },
            contract=Contract("exact"),
            payload={"map": self.map, "dtype": dtype, "maps": payload},
        )

    def _summary(self, count: int) -> str:
        chosen = ", ".join(f"{key}={_shown(value)}" for key, value in self.options.items())
        what = "1 parameter" if count == 1 else f"{count} parameters"
        return f"{self.map} of {what}" + (f" ({chosen})" if chosen else "")

    def _dtype(self, members: Sequence[_Member]) -> str:
        """The dtype of a map, by its name: one that takes in every number of what it maps."""
        widest = torch.float32
        for member in members:
            widest = torch.promote_types(widest, member.dtype)
        name = str(widest).removeprefix("torch.")
        if self.dtype == "float32" and name != "float32":
            raise RuleError(
                f"a map in float32 rounds the {name} parameters of {_site(members)}, so that it "
                "would not start as the identity",
                hint="leave dtype out",
            )
        return self.dtype or name

    def _specs(self, made: Mapping[str, Any], dtype: str) -> dict[str, TensorSpec]:
        """Name → spec of the tensors of one map."""
        try:
            built = self._made(made, dtype, torch.device("meta"))
        except ValueError as error:
            raise RuleError(f"map {self.map!r} on {_listed(made)}: {error}") from None
        return {
            f"{_prefix(made)}.{name}": TensorSpec(tuple(tensor.shape), dtype)
            for name, tensor in built.named_parameters()
        }

    def _made(self, made: Mapping[str, Any], dtype: str, device: torch.device) -> MirrorMap:
        return self.kind(
            [tuple(shape) for shape in made["shapes"]],
            owners=made["owners"],
            options=self.made_with,
            device=device,
            dtype=cast("torch.dtype", getattr(torch, dtype)),
        )

    def _way_out(self) -> str:
        if self.kind.couples:
            return "stronger options: {shrink: ...}, or a narrower where:, makes them smaller"
        return "a lower rank or fewer pieces in options:, or a narrower where:, makes them smaller"

    # -- applying ------------------------------------------------------------------------------

    def _build(
        self,
        edit: Edit,
        made: Mapping[str, Any],
        members: Sequence[tuple[nn.Module, str]],
        context: ApplyContext,
    ) -> MirrorMap:
        first, name = members[0]
        built = self._made(made, edit.payload["dtype"], own_parameters(first)[name].device)
        if not context.values_follow:
            with context.generator(_prefix(made)) as generator:
                built.start(generator)
        return built.train(first.training)


@dataclass(frozen=True)
class _Member:
    """A parameter that is to be mapped.

    Attributes:
        path: Path of the module that holds it.
        parameter: Its name there.
        shape: Its shape.
        dtype: Its dtype.
        module: The module; None if an earlier rule of the recipe will make it.
        tensor: The parameter, likewise.
    """

    path: str
    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: nn.Module | None
    tensor: Tensor | None

    @property
    def name(self) -> str:
        return joined(self.path, self.parameter)


def _exists(site: Site) -> bool:
    return site.parameter is None or site.parameter in own_parameters(site.module)


def _added(site: Site) -> Iterator[tuple[str, nn.Module]]:
    """What earlier rules added to a layer, save mirror maps, with every module inside."""
    stock = own_children(site.module)
    for name, child in children(site.module).items():
        if name in stock or isinstance(child, Mirrors):
            continue
        for path, module in named_modules(child, duplicates=False):
            if MAPS not in path.split("."):
                yield joined(site.path, name, path), module


def _unsuited(module: nn.Module, name: str) -> str | None:
    """Why a parameter of a module cannot be mapped."""
    tensor = own_parameters(module)[name]
    if isinstance(tensor, UninitializedParameter):
        return f"its {name} is not initialised yet; run the model once first"
    if not is_plain(tensor):
        return f"its {name} is a {type(tensor).__name__} of {tensor.dtype}: quantised or sharded"
    if not tensor.numel():
        return f"its {name} has no numbers"
    place = elsewhere(module, name)
    if place is not None:
        return f"its forward has {name} from its attribute {place} too, past any map"
    return None


def _check_storage(members: Sequence[_Member], context: PlanContext) -> None:
    """Raise if a mapped parameter shares its memory with another tensor, which would not be mapped.

    Raises:
        Conflict: it does, tied as one object or as a view.
    """
    holders: dict[object, list[str]] = {}
    for path, module in named_modules(context.model, duplicates=False):
        plain = {name: t for name, t in vars(module).items() if isinstance(t, Tensor)}
        for name, tensor in {**own_parameters(module), **own_buffers(module), **plain}.items():
            for key in _memory(tensor):
                holders.setdefault(key, []).append(joined(path, name))
    for member in members:
        if member.tensor is None:
            continue
        for key in _memory(member.tensor):
            if len(holders[key]) > 1:
                other = next(name for name in holders[key] if name != member.name)
                raise Conflict(
                    f"{member.name} and {other} share their memory, so a step on the one as a "
                    "dual would move the other as well",
                    hint="untie them first, or leave both out with except:",
                )


def _check_values(members: Sequence[_Member]) -> None:
    """Raise if a mapped parameter is not finite: what a map makes of one number reaches others.

    Raises:
        ModelStateError: one is not.
    """
    for member in members:
        if member.tensor is None or member.tensor.is_meta:
            continue
        broken = int((~torch.isfinite(member.tensor)).sum())
        if broken:
            raise ModelStateError(
                f"{broken} of the {member.tensor.numel()} numbers of {member.name} are NaN or "
                "infinite, and a map would spread them",
                hint="load weights that are finite, or leave it out with except:",
            )


def _memory(tensor: Tensor) -> Iterator[object]:
    yield id(tensor)
    if is_plain(tensor) and not tensor.is_meta:
        yield (tensor.device, tensor.untyped_storage().data_ptr(), "storage")


def _check_others(member: _Member, context: PlanContext) -> None:
    """Raise if a map does not go together with what is done to a parameter already."""
    if member.module is not None:
        check_free(member.module, member.path)
        check_carrier(member.module, member.path)
        if is_mapped(member.module, member.parameter):
            raise Conflict(
                f"{member.name} has a mirror map already",
                hint="undo that first, or freeze it with a freeze rule",
            )
        _check_bank(member, member.module)
    for edit in context.earlier:
        if "method" not in edit.payload or member.name not in edit.uses:
            continue
        method = edit.payload["method"]
        if edit.contract.kind != "exact" or _touches(method_named(method)):
            raise _touched(member, method)


def _check_bank(member: _Member, module: nn.Module) -> None:
    bank = bank_of(module, member.parameter)
    if bank is None or bank.parameter != member.parameter:
        return
    if bank.merged is not None:
        raise Conflict(
            f"adapters are merged into {member.name}",
            hint="call surgery.adapters.unmerge(model) first",
        )
    for name, adapter in bank.adapters.items():
        if any(_touches(type(method)) or method.beginning for method in adapter.methods):
            raise _touched(member, name)


def _touches(kind: type[Method]) -> bool:
    """Whether a method computes with the weight beside it, or writes to it."""
    return kind.reads_weight or kind.scales_rows or kind.changes_weight or kind.folds_weight


def _touched(member: _Member, method: str) -> Conflict:
    return Conflict(
        f"adapter {method!r} reads or changes {member.name} itself, which as a dual is not what "
        "the model computes with",
        hint="map the adapter's own factors (created_by:), or use method: lora",
    )


def _check_devices(members: Sequence[_Member]) -> None:
    devices = {each.tensor.device for each in members if each.tensor is not None}
    if len(devices) > 1:
        raise RuleError(
            f"the map couples parameters on {', '.join(sorted(map(str, devices)))}",
            hint="give the parameters of each device a rule of their own",
        )


def _number(context: PlanContext) -> str:
    """The name of a new map of several parameters among those of the root."""
    earlier = [*context.earlier, *(context.record.edits if context.record else ())]
    taken = {made["key"] for edit in earlier for made in edit.payload.get("maps", ())}
    taken |= set(own_parameters(context.model))
    number = 0
    while str(number) in taken:
        number += 1
    return str(number)


def _was_baked(model: nn.Module, edit: Edit) -> bool:
    """Whether a later edit took the maps away, and puts them back before this one is reverted."""
    record = record_of(model)
    removed = [name for each in (record.edits if record else ()) for name in each.removes]
    return not set(edit.adds).isdisjoint(removed)


def _is_there(model: nn.Module, made: Mapping[str, Any], context: ApplyContext) -> bool:
    mirrors = mirrors_of(context.module(model, made["holder"]))
    return mirrors is not None and made["key"] in children(mirrors)


def _prefix(made: Mapping[str, Any]) -> str:
    return joined(made["holder"], MAPS, made["key"])


def _places(edit: Edit) -> list[tuple[str, str]]:
    """Path of the module and name of every parameter that an edit maps."""
    return [(path, name) for made in edit.payload["maps"] for path, name in made["members"]]


def _shapes(edit: Edit) -> list[list[int]]:
    return [shape for made in edit.payload["maps"] for shape in made["shapes"]]


def _frozen_duals(edits: Sequence[Edit], context: PlanContext) -> Iterator[str]:
    """That some duals do not require gradients, which may be meant, but seldom is."""
    parameters = dict(named_parameters(context.model))
    names = [joined(*place) for edit in edits for place in _places(edit)]
    frozen = [n for n in names if n in parameters and not parameters[n].requires_grad]
    if not frozen:
        return
    yield (
        f"{len(frozen)} of the {len(names)} parameters that it maps do not require gradients "
        f"({some(frozen)}): as duals they stay where they are, and only their map is trained; call "
        "requires_grad_(True) on them, or, if a rule froze them, put both rules into one recipe"
    )


def _site(members: Sequence[_Member]) -> str:
    paths = list(dict.fromkeys(each.path for each in members))
    if len(members) == 1:
        return members[0].name
    return f"{paths[0]}..{paths[-1]}" if len(paths) > 1 else paths[0]


def _listed(made: Mapping[str, Any]) -> str:
    return some((joined(*member) for member in made["members"]), 1)


def _shown(value: object) -> str:
    return "x".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else str(value)
