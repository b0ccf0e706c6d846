"""Low-rank adapters beside frozen weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import AfterValidator, Field
from torch import nn

from architectures.adapters import Adapter, Matrix, Method, Ranges, Sliced
from surgery.capture.graft import check_graftable, grafts
from surgery.errors import ModelStateError, RuleError
from surgery.passes.base import ApplyContext, Pass, PlanContext
from surgery.passes.hosts import (
    CHILD,
    HOSTS,
    Bank,
    Family,
    Place,
    Use,
    Uses,
    attach,
    bank_of,
    check_free,
    detach,
    hosting_of,
    take_out,
)
from surgery.record import Contract, Edit, Record, TensorSpec, record_of
from surgery.registry import ADAPTERS, suggest
from surgery.rules import invalid, options
from surgery.select import Match, Site
from surgery.tree import named_modules, named_parameters, own_parameters

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_BANK = Bank(Matrix((), (), 0, 0), Family(), parameter="", trained=False, keep_base="none")
_RESERVED = frozenset({*dir(Bank), *vars(_BANK)})


def _known_method(name: str) -> str:
    if name not in ADAPTERS.names():
        raise invalid(f"unknown method {name!r}", hint=suggest(name, ADAPTERS.names()))
    return name


def _adapter_name(name: str) -> str:
    if _NAME.fullmatch(name) is None or name in _RESERVED:
        raise invalid(
            f"{name!r} cannot name an adapter",
            hint="a name has letters, digits, '-' and '_', starts with a letter, and is no "
            "attribute of a module",
        )
    return name


@options
class LowRank(Pass):
    """Contract ``exact``: adapters start as no change at all.

    Puts an adapter beside the weight of each site and freezes the rest of the model. A weight
    that several modules share is adapted once, wherever it is used. Without a ``where`` every
    weight that can be adapted is a site, embeddings and heads included.

    Args:
        method: Name of the adapter method; ``surgery list methods`` shows them.
        rank: Rank of the change.
        alpha: Numerator of the scaling; the rank by default, which scales by 1.
        dropout: Probability of dropping an input of the low-rank branch while training.
        scaling: ``standard`` scales by alpha / rank, ``rslora`` by alpha / √rank
            (arXiv 2312.03732).
        init: How A is drawn; B is zero. ``kaiming`` is uniform within ±1/√columns, ``gaussian``
            normal with standard deviation 1/rank.
        adapter: Name of the adapter; a site can carry several.
        slices: Parts of a fused weight, such as ``[q, v]`` of a qkv; each gets factors of its
            own, and the other parts stay as they are. The whole weight by default.
        dtype: Of the new tensors, such as ``float32`` beside a bfloat16 weight; that of the
            weight by default.
        keep_base: What undoing a change of the weight itself (a merge, or a method that changes
            it) is done from: a copy in ``memory``, or ``none``, which makes undo inexact or
            impossible.
        freeze: What stops requiring gradients: every parameter of the ``model`` that no rewrite
            added, those of the adapted ``sites``, or ``none``.
    """

    name: ClassVar[str] = "lowrank"

    method: Annotated[str, AfterValidator(_known_method)] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    adapter: Annotated[str, AfterValidator(_adapter_name)] = "default"
    slices: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    keep_base: Literal["memory", "none"] = "memory"
    freeze: Literal["model", "sites", "none"] = "model"

    @property
    def factor(self) -> float:
        """What ``B A`` is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def accepts(self, site: Site) -> Match:
        """Whether the site has a weight of two or more dimensions that some host can carry."""
        found = hosting_of(site.module, site.parameter, read_outside=False)
        if isinstance(found, str):
            return Match.no(found)
        if found.matrix.max_rank < 2:
            return Match.no(f"its {found.parameter} {list(found.matrix.shape)} is a vector")
        return Match.yes(f"its {found.parameter} is {list(found.matrix.shape)}")

    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        """One edit per weight; a weight that several selected sites share has one."""
        known = Uses(context.model)
        edits: dict[tuple[int, str], Edit] = {}
        for site in sites:
            uses = known.of(site)
            key = (id(uses[0].module), uses[0].hosting.parameter)
            if key not in edits:
                edits[key] = self._edit(site, uses, context)
        return list(edits.values())

    def frozen(
        self, model: nn.Module, edits: Sequence[Edit], created: AbstractSet[str]
    ) -> Iterable[str]:
        """Every stock parameter, those of the adapted modules, or none."""
        if self.freeze == "none":
            return ()
        each_once = named_parameters(model, duplicates=False)
        stock = [name for name, _ in each_once if name not in created]
        if self.freeze == "model":
            return stock
        places = [place for edit in edits for place in _places(edit)]
        bare = {_join(place.path, place.parameter) for place in places if place.bare}
        layers = {place.path for place in places if not place.bare}
        return [name for name in stock if name in bare or name.rpartition(".")[0] in layers]

    def check_revertible(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Raise if a host was wrapped since, or its weight is merged and has no copy."""
        for place in _places(edit):
            module = context.module(model, place.path)
            check_graftable(module, place.path)
            bank = bank_of(module, place.parameter)
            if bank is None or self.adapter not in bank.adapters:
                raise ModelStateError(
                    f"{place.path} no longer has its adapter {self.adapter!r}",
                    hint="it was removed by other means than surgery.undo",
                )
            if bank.merged and not bank.copied:
                raise ModelStateError(
                    f"adapters were merged into {_join(place.path, place.parameter)} without "
                    "keeping a copy, so it cannot be put back bit for bit",
                    hint="call surgery.adapters.unmerge(model) first, which subtracts them",
                )

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Add the adapter to the bank of the weight, and the bank to every user of the weight."""
        places = _places(edit)
        modules = [context.module(model, place.path) for place in places]
        for module, place in zip(modules, places, strict=True):
            if HOSTS[place.host] not in grafts(module):
                check_graftable(module, place.path)
        first = modules[0]
        adapter = self._build(edit, first, context).train(first.training)
        bank = bank_of(first, places[0].parameter)
        if bank is None:
            weight = own_parameters(first).get(places[0].parameter)
            trained = weight is not None and weight.requires_grad
            bank = Bank(
                _matrix_of(edit),
                _family(model, context),
                parameter=places[0].parameter,
                trained=trained,
                keep_base=self.keep_base,
            )
            bank.train(first.training)
        bank.add_module(self.adapter, adapter)
        # What counted before goes on counting: applying changes nothing in what is computed.
        bank.active = (*bank.active, (self.adapter, 1.0))
        for module, place in zip(modules, places, strict=True):
            attach(module, place, bank)

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Take the adapter out, and with the last one the bank and the host."""
        places = _places(edit)
        modules = [context.module(model, place.path) for place in places]
        bank = cast("Bank", bank_of(modules[0], places[0].parameter))
        name = _join(places[0].path, places[0].parameter)
        weight = own_parameters(modules[0]).get(places[0].parameter)
        if bank.merged is not None and weight is not None:
            take_out(weight, bank, _forget_kept(model, name) if bank.copied else None)
        if name in context.kept and weight is not None:
            weight.data.copy_(context.kept.pop(name))
        bank.active = tuple(pair for pair in bank.active if pair[0] != self.adapter)
        if len(bank.adapters) > 1:
            del bank.adapters[self.adapter]
            return
        for module, place in zip(modules, places, strict=True):
            detach(module, place)

    def state(self, model: nn.Module, edit: Edit, context: ApplyContext) -> dict[str, Any]:
        """The adapter's share in what is active, and in what is merged if anything is."""
        place = _places(edit)[0]
        bank = cast("Bank", bank_of(context.module(model, place.path), place.parameter))
        return {
            "active": dict(bank.active).get(self.adapter),
            "merged": bank.merged is not None,
            "share": dict(bank.merged or ()).get(self.adapter),
            "copied": bank.copied,
        }

    def baked(self, model: nn.Module, edit: Edit, context: ApplyContext) -> bool:
        """Whether adapters are merged into the weight: the host adds nothing then."""
        place = _places(edit)[0]
        bank = cast("Bank", bank_of(context.module(model, place.path), place.parameter))
        return bank.merged is not None

    def resume(
        self, model: nn.Module, edit: Edit, state: Mapping[str, Any], context: ApplyContext
    ) -> None:
        """Set the shares as they were. The weights come merged from the checkpoint."""
        place = _places(edit)[0]
        bank = cast("Bank", bank_of(context.module(model, place.path), place.parameter))
        bank.active = tuple(pair for pair in bank.active if pair[0] != self.adapter)
        if state["active"] is not None:
            bank.active = (*bank.active, (self.adapter, state["active"]))
        if state["merged"]:
            added = () if state["share"] is None else ((self.adapter, state["share"]),)
            bank.merged = (*(bank.merged or ()), *added)
        bank.copied = state["copied"]

    def _edit(self, site: Site, uses: tuple[Use, ...], context: PlanContext) -> Edit:
        hosting = uses[0].hosting
        method = cast("type[Method]", ADAPTERS.get(self.method))
        self._check(site, uses, method)
        slices = self._slices(site, context)
        dtype = self.dtype or str(hosting.dtype).removeprefix("torch.")
        weight = _join(uses[0].path, hosting.parameter)
        holder = _join(uses[0].path, CHILD)
        prefix = _join(_join(holder, hosting.parameter) if uses[0].bare else holder, self.adapter)
        adds: dict[str, TensorSpec] = {}
        for name, matrix in _parts(prefix, hosting.matrix, slices):
            self._check_rank(site, matrix)
            for tensor, shape in method.tensors(matrix, self.rank).items():
                adds[f"{name}.{tensor}"] = TensorSpec(shape, dtype)
        return Edit(
            rule=context.rule,
            pass_name=self.name,
            site=weight if uses[0].bare else uses[0].path,
            summary=self._summary(),
            adds=adds,
            uses={weight: "extend", prefix: "replace"},
            contract=Contract("exact"),
            payload={
                "prefix": prefix,
                "places": [
                    [use.path, use.hosting.parameter, use.hosting.host, use.bare] for use in uses
                ],
                "matrix": _matrix_data(hosting.matrix),
                "dtype": dtype,
                "slices": {name: [list(pair) for pair in pairs] for name, pairs in slices.items()},
            },
            notes=self._notes(site, uses),
            reversible=self.keep_base == "memory" or not method.changes_weight,
        )

    def _check(self, site: Site, uses: tuple[Use, ...], method: type[Method]) -> None:
        """Raise if an option does not suit one of the uses of the site's weight."""
        for use in uses:
            check_free(use.module, use.path)
            if self.dropout and not use.hosting.takes_dropout:
                raise RuleError(
                    f"{_label(use)} is adapted through its weight, so there is no input that "
                    f"dropout {self.dropout:g} could drop",
                    hint="give this site a rule of its own with dropout: 0",
                )
            if (method.reads_weight or method.scales_rows) and not use.hosting.readable:
                raise RuleError(
                    f"method {self.method!r} reads the weight, and that of {_label(use)} is "
                    "quantised or parametrised",
                    hint="use a method that does not, such as lora",
                )
            if method.scales_rows and use.hosting.host == "embedding":
                raise RuleError(
                    f"method {self.method!r} scales whole rows, which an embedding "
                    f"({_label(use)}) does not support",
                    hint="leave embeddings out with except:, or use method: lora",
                )
        if self.slices and (method.scales_rows or uses[0].hosting.matrix.stack):
            raise RuleError(f"{site.path} cannot be adapted by slices with {self.method!r}")

    def _check_rank(self, site: Site, matrix: Matrix) -> None:
        if self.rank > matrix.max_rank:
            raise RuleError(
                f"rank {self.rank} is larger than the {matrix.rows} x {matrix.columns} matrix of "
                f"{site.path}",
                hint=f"use a rank of at most {matrix.max_rank}, or leave the site out",
            )

    def _slices(self, site: Site, context: PlanContext) -> dict[str, Ranges]:
        """Name → rows of the slices that were asked for; empty for the whole weight."""
        if self.slices is None:
            return {}
        role = context.map.role(site)
        missing = [name for name in self.slices if name not in role.slices]
        if missing:
            known = ", ".join(role.slices) or f"none: {role.reason}"
            raise RuleError(
                f"{site.path} has no slice {missing[0]!r}; its slices are {known}",
                hint="slices are for fused projections; a separate query or value projection is "
                "selected by its role",
            )
        return {name: _ranges(role.slices[name]) for name in self.slices}

    def _summary(self) -> str:
        parts = "" if self.slices is None else f" on {', '.join(self.slices)}"
        named = "" if self.adapter == "default" else f" {self.adapter!r}"
        return f"{self.method}{named} r={self.rank}{parts}, scaled by {self.factor:g}"

    def _notes(self, site: Site, uses: tuple[Use, ...]) -> tuple[str, ...]:
        notes: list[str] = []
        if len(uses) > 1:
            paths = " and ".join(_label(use) for use in uses)
            notes.append(f"{paths} share one weight: one adapter serves all, and the tie stays")
        notes.extend(
            f"{_label(use)} is adapted through its weight, which is formed in every forward"
            for use in uses
            if use.hosting.host == "weight" and not use.bare
        )
        return tuple(notes)

    def _build(self, edit: Edit, module: nn.Module, context: ApplyContext) -> Adapter:
        """The adapter of an edit, with its first values."""
        slices = _slices_of(edit)
        made = {
            name: self._start(name, matrix, edit, module, context)
            for name, matrix in _parts(edit.payload["prefix"], _matrix_of(edit), slices)
        }
        if not slices:
            return next(iter(made.values()))
        parts = {
            name: (ranges, adapter)
            for (name, ranges), adapter in zip(slices.items(), made.values(), strict=True)
        }
        return Sliced(parts, _matrix_of(edit).rows)

    def _start(
        self, name: str, matrix: Matrix, edit: Edit, module: nn.Module, context: ApplyContext
    ) -> Method:
        method = cast("type[Method]", ADAPTERS.get(self.method))
        place = _places(edit)[0]
        weight = own_parameters(module).get(place.parameter)
        made = method(
            matrix,
            rank=self.rank,
            scaling=self.factor,
            dropout=self.dropout,
            device=_device(module, weight),
            dtype=getattr(torch, edit.payload["dtype"]),
        )
        base = None if weight is None or not method.reads_weight else matrix.fold(weight.detach())
        with context.generator(name) as generator:
            changed = made.start(self.init, generator, base)
        if changed is not None and weight is not None:
            if self.keep_base == "memory":
                context.kept[_join(place.path, place.parameter)] = weight.detach().clone()
            weight.data.copy_(matrix.unfold(changed))
        return made


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _label(use: Use) -> str:
    return _join(use.path, use.hosting.parameter) if use.bare else use.path


def _parts(prefix: str, matrix: Matrix, slices: dict[str, Ranges]) -> list[tuple[str, Matrix]]:
    """Name of every adapter of an edit, and the matrix it changes."""
    if not slices:
        return [(prefix, matrix)]
    return [
        (f"{prefix}.{name}", Matrix.of((_rows(ranges), matrix.columns), stacked=False))
        for name, ranges in slices.items()
    ]


def _rows(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def _ranges(features: tuple[int, int] | list[int]) -> Ranges:
    """Output features as ascending half-open ranges."""
    if isinstance(features, tuple):
        return (features,)
    ranges: list[tuple[int, int]] = []
    for index in sorted(features):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def _places(edit: Edit) -> list[Place]:
    return [Place(*each) for each in edit.payload["places"]]


def _matrix_data(matrix: Matrix) -> dict[str, Any]:
    return {
        "shape": list(matrix.shape),
        "stack": list(matrix.stack),
        "rows": matrix.rows,
        "columns": matrix.columns,
        "transposed": matrix.transposed,
    }


def _matrix_of(edit: Edit) -> Matrix:
    fields = edit.payload["matrix"]
    return Matrix(
        shape=tuple(fields["shape"]),
        stack=tuple(fields["stack"]),
        rows=fields["rows"],
        columns=fields["columns"],
        transposed=fields["transposed"],
    )


def _slices_of(edit: Edit) -> dict[str, Ranges]:
    slices = cast("dict[str, list[list[int]]]", edit.payload["slices"])
    return {name: tuple((a, b) for a, b in pairs) for name, pairs in slices.items()}


def _device(module: nn.Module, weight: torch.Tensor | None) -> torch.device:
    """Where the weight lives; of a packed one, where anything of its module does."""
    if weight is not None:
        return weight.device
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.get_default_device()


def _family(model: nn.Module, context: ApplyContext) -> Family:
    """The family of a model's banks: that of one there is, or a new one per application."""
    if "family" not in context.shared:
        banks = (module for _, module in named_modules(model) if isinstance(module, Bank))
        first = next(banks, None)
        context.shared["family"] = Family() if first is None else first.family
    return cast("Family", context.shared["family"])


def _forget_kept(model: nn.Module, name: str) -> torch.Tensor:
    """The copy of a stock weight that the edit log holds, removed from it."""
    operations = cast("Record", record_of(model)).operations
    return next(each.kept.pop(name) for each in operations if name in each.kept)
