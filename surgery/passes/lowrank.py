"""Low-rank adapters beside frozen weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
)
from torch import Tensor, nn

from architectures.adapters import Adapter, Matrix, Method, Ranges
from surgery.capture.graft import check_graftable, grafts
from surgery.errors import Conflict, ModelStateError, RuleError
from surgery.passes.base import ApplyContext, Pass, PlanContext
from surgery.passes.hosts import (
    BEFORE_MERGE,
    CHILD,
    HOSTS,
    Bank,
    Family,
    Use,
    Uses,
    attach,
    bank_of,
    check_free,
    detach,
    has_folded,
    hosting_of,
    take_out,
)
from surgery.passes.methods import completed_options, known_method, method_named
from surgery.passes.payload import (
    joined,
    matrix_data,
    matrix_of,
    parts_of,
    places_of,
    ranges_of,
    slices_of,
    whole,
)
from surgery.passes.splitting import CLOSE, digest_of, give_back, rows_of, told_of, write_rows
from surgery.record import Contract, Edit, Record, TensorSpec, record_of
from surgery.rules import invalid, options
from surgery.select import Match, Site
from surgery.sources.again import load_again, why_not_again
from surgery.tree import named_modules, named_parameters, own_parameters

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


_BANK = Bank(Matrix((), (), 0, 0), Family(), parameter="", trained=False, keep_base="none")
_RESERVED = frozenset({*dir(Bank), *vars(_BANK)})


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
            it) is done from: a copy in ``memory``, the ``source`` that the model was loaded from,
            or ``none``, which makes undo inexact or impossible.
        freeze: What stops requiring gradients: every parameter of the ``model`` that no rewrite
            added, those of the adapted ``sites``, or ``none``. What a mirror map is over is to be
            trained, and goes on requiring them.
        options: Options of the method's own, such as ``{warmup: 100}``; docs/methods.md lists
            them.
    """

    name: ClassVar[str] = "lowrank"
    separable: ClassVar[bool] = True
    settled_by: ClassVar[str] = "merge the adapters with surgery.adapters.merge(model)"

    method: Annotated[str, AfterValidator(known_method)] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    adapter: Annotated[str, AfterValidator(_adapter_name)] = "default"
    slices: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    keep_base: Literal["memory", "source", "none"] = "memory"
    freeze: Literal["model", "sites", "none"] = "model"
    # Validated when it is a default too: a rule is written back with every option of its method.
    options: Mapping[str, Any] = Field(default_factory=dict[str, Any], validate_default=True)

    @field_validator("options")
    @classmethod
    def _complete_options(cls, value: Mapping[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Every option of the method. Skipped where there is no such method."""
        method = info.data.get("method")
        return dict(value) if method is None else completed_options(method, value)

    @property
    def made_with(self) -> Any:
        """The method's own options, as an instance of its ``Options``."""
        return method_named(self.method).Options(**self.options)

    @property
    def factor(self) -> float:
        """What ``B A`` is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    @property
    def kind(self) -> type[Method]:
        """The method."""
        return method_named(self.method)

    @property
    def splits(self) -> bool:
        """Whether adapters start as a part of the weight, which is taken out of it."""
        return self.kind.changes_base(self.made_with)

    @property
    def _touches(self) -> str:
        """What the method does with the values of the weight, in a word; empty if nothing."""
        if self.splits or self.kind.folds_weight:
            return "changes"
        return "reads" if self.kind.reads_weight or self.kind.scales_rows else ""

    @property
    def _without_touching(self) -> str:
        """What to do where the values of the weight must be left alone."""
        given = self.options
        rests = {name: {k: v for k, v in given.items() if k != name} for name in given}
        for name, rest in rests.items():
            if self._touches and not dataclasses.replace(self, options=rest)._touches:
                return f"leave {name} out of its options"
        return "use a method that does not, such as lora"

    @property
    def summary(self) -> str:
        """What is done to a site, in a few words."""
        parts = "" if self.slices is None else f" on {', '.join(self.slices)}"
        named = "" if self.adapter == "default" else f" {self.adapter!r}"
        lasting = " for good" if self.keep_base == "none" else ""
        trains = f", training changes the weight{lasting}" if self.kind.folds_weight else ""
        return f"{self.method}{named} r={self.rank}{parts}, scaled by {self.factor:g}{trains}"

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
        self, model: nn.Module, edits: Sequence[Edit], spared: AbstractSet[str]
    ) -> Iterable[str]:
        """Every stock parameter, those of the adapted modules, or none; no dual of a map."""
        if self.freeze == "none":
            return ()
        each_once = named_parameters(model, duplicates=False)
        stock = [name for name, _ in each_once if name not in spared]
        if self.freeze == "model":
            return stock
        places = [place for edit in edits for place in places_of(edit)]
        bare = {joined(place.path, place.parameter) for place in places if place.bare}
        layers = {place.path for place in places if not place.bare}
        return [name for name in stock if name in bare or name.rpartition(".")[0] in layers]

    def check_revertible(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Raise if a host was wrapped since, or its weight is merged and has no copy."""
        for place in places_of(edit):
            module = context.module(model, place.path)
            check_graftable(module, place.path)
            bank = bank_of(module, place.parameter)
            if bank is None or self.adapter not in bank.adapters:
                raise ModelStateError(
                    f"{place.path} no longer has its adapter {self.adapter!r}",
                    hint="it was removed by other means than surgery.undo",
                )
            merged = bank.merged is not None and bool(bank.contributions(bank.merged))
            if merged and not bank.copied:
                raise ModelStateError(
                    f"adapters were merged into {joined(place.path, place.parameter)} without "
                    "keeping a copy, so it cannot be put back bit for bit",
                    hint="call surgery.adapters.unmerge(model) first, which subtracts them",
                )
            if self.adapter in bank.originals or has_folded(bank.adapters[self.adapter]):
                self.original(model, edit, context)

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Add the adapter to the bank of the weight, and the bank to every user of the weight."""
        places = places_of(edit)
        modules = [context.module(model, place.path) for place in places]
        for module, place in zip(modules, places, strict=True):
            if HOSTS[place.host] not in grafts(module):
                check_graftable(module, place.path)
        first = modules[0]
        weight = own_parameters(first).get(places[0].parameter)
        original = None if context.values_follow else self._digest(weight)
        adapter = self._build(edit, first, context).train(first.training)
        bank = bank_of(first, places[0].parameter)
        if bank is None:
            trained = weight is not None and weight.requires_grad
            bank = Bank(
                matrix_of(edit),
                _family(model, context),
                parameter=places[0].parameter,
                trained=trained,
                keep_base=self.keep_base,
            )
            bank.train(first.training)
        bank.add_module(self.adapter, adapter)
        if original is not None:
            bank.originals[self.adapter] = original
        if not context.values_follow and any(each.is_meta for each in adapter.parameters()):
            bank.pending |= {self.adapter}
        # What counted before goes on counting: applying changes nothing in what is computed.
        bank.active = (*bank.active, (self.adapter, 1.0))
        for module, place in zip(modules, places, strict=True):
            attach(module, place, bank)

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Take the adapter out, and with the last one the bank and the host."""
        places = places_of(edit)
        modules = [context.module(model, place.path) for place in places]
        bank = cast("Bank", bank_of(modules[0], places[0].parameter))
        name = joined(places[0].path, places[0].parameter)
        weight = own_parameters(modules[0]).get(places[0].parameter)
        if bank.merged is not None and weight is not None:
            take_out(weight, bank, _forget_kept(model, name) if bank.copied else None)
        if weight is not None and (name in context.kept or self.adapter in bank.originals):
            weight.data.copy_(self.original(model, edit, context))
            context.kept.pop(name, None)
            bank.originals.pop(self.adapter, None)
        elif not edit.reversible and weight is not None:
            give_back(weight, edit, bank.adapters[self.adapter])
        bank.active = tuple(pair for pair in bank.active if pair[0] != self.adapter)
        bank.pending -= {self.adapter}
        if len(bank.adapters) > 1:
            del bank.adapters[self.adapter]
            return
        for module, place in zip(modules, places, strict=True):
            detach(module, place)

    def settle(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Take out of the weight what the adapter started from; its factors are loaded."""
        place = places_of(edit)[0]
        weight = own_parameters(context.module(model, place.path)).get(place.parameter)
        bank = self.bank(model, edit, context)
        if weight is None or bank.merged is not None:
            return
        if (original := self._digest(weight)) is not None:
            bank.originals[self.adapter] = original
        if not self.splits:
            return
        self._keep(edit, weight, context)
        methods = bank.adapters[self.adapter].methods
        rows = rows_of(weight, edit)
        left = [m.without_beginning(base) for m, base in zip(methods, rows, strict=True)]
        write_rows(weight, edit, left)

    def bank(self, model: nn.Module, edit: Edit, context: ApplyContext) -> Bank:
        """The bank that an applied edit put its adapter into."""
        place = places_of(edit)[0]
        return cast("Bank", bank_of(context.module(model, place.path), place.parameter))

    def original(self, model: nn.Module, edit: Edit, context: ApplyContext) -> Tensor:
        """The weight of an applied edit as it was before: the copy, or read from the source.

        Raises:
            ModelStateError: there is no copy, or the source holds another weight now.
            SourceError: the source cannot be reached.
        """
        place = places_of(edit)[0]
        name = joined(place.path, place.parameter)
        if name in context.kept:
            return context.kept[name]
        digest = self.bank(model, edit, context).originals.get(self.adapter)
        if digest is None:
            raise ModelStateError(
                f"no copy of the original weight of {edit.site} was kept",
                hint="apply with keep_base: memory or source",
            )
        if "source" not in context.shared:
            context.shared["source"] = load_again(model)
        found: Tensor | None = context.shared["source"].get(name)
        weight = own_parameters(context.module(model, place.path))[place.parameter]
        if found is None or digest_of(found.to(weight.dtype)) != digest:
            raise ModelStateError(
                f"the source of the model no longer holds the weight of {edit.site} that "
                f"{self.method!r} started from",
                hint="load the model again",
            )
        return found.to(weight.device, weight.dtype)

    def put_original(
        self, model: nn.Module, edit: Edit, original: Tensor, kept: dict[str, Tensor]
    ) -> None:
        """Give a weight its original values for good; the copy for undo is given up."""
        context = ApplyContext(0)
        place = places_of(edit)[0]
        weight = own_parameters(context.module(model, place.path))[place.parameter]
        weight.data.copy_(original)
        kept.pop(joined(place.path, place.parameter), None)
        self.bank(model, edit, context).originals.pop(self.adapter, None)

    def originals(
        self, model: nn.Module, edit: Edit, context: ApplyContext
    ) -> Mapping[str, Tensor]:
        """The original weight, where it is to be read again from the source."""
        if self.adapter not in self.bank(model, edit, context).originals:
            return {}
        place = places_of(edit)[0]
        return {joined(place.path, place.parameter): self.original(model, edit, context)}

    def state(self, model: nn.Module, edit: Edit, context: ApplyContext) -> dict[str, Any]:
        """The adapter's share in what is active, and in what is merged if anything is."""
        bank = self.bank(model, edit, context)
        return {
            "active": dict(bank.active).get(self.adapter),
            "merged": bank.merged is not None,
            "share": dict(bank.merged or ()).get(self.adapter),
            "copied": bank.copied,
            "original": bank.originals.get(self.adapter),
        }

    def baked(self, model: nn.Module, edit: Edit, context: ApplyContext) -> bool:
        """Whether adapters are merged into the weight: the host adds nothing then."""
        return self.bank(model, edit, context).merged is not None

    def bound(self, model: nn.Module, edit: Edit, context: ApplyContext) -> bool:
        """Whether training the adapter has changed the weight beside it."""
        return has_folded(self.bank(model, edit, context).adapters[self.adapter])

    def resume(
        self, model: nn.Module, edit: Edit, state: Mapping[str, Any], context: ApplyContext
    ) -> None:
        """Set the shares as they were. The weights come merged from the checkpoint."""
        bank = self.bank(model, edit, context)
        bank.active = tuple(pair for pair in bank.active if pair[0] != self.adapter)
        if state["active"] is not None:
            bank.active = (*bank.active, (self.adapter, state["active"]))
        if state["merged"]:
            added = () if state["share"] is None else ((self.adapter, state["share"]),)
            bank.merged = (*(bank.merged or ()), *added)
        bank.copied = state["copied"]
        if state.get("original") is not None:  # absent in logs of version 0.1
            bank.originals[self.adapter] = state["original"]

    def _edit(self, site: Site, uses: tuple[Use, ...], context: PlanContext) -> Edit:
        hosting = uses[0].hosting
        self._check(site, uses)
        self._check_source(context)
        self._check_others(uses[0], context)
        slices = self._slices(site, context)
        dtype = self.dtype or str(hosting.dtype).removeprefix("torch.")
        weight = joined(uses[0].path, hosting.parameter)
        holder = joined(uses[0].path, CHILD)
        prefix = joined(joined(holder, hosting.parameter) if uses[0].bare else holder, self.adapter)
        adds: dict[str, TensorSpec] = {}
        for name, matrix in parts_of(prefix, hosting.matrix, slices):
            self._check_rank(site, matrix)
            adds.update(self._specs(name, matrix, dtype))
        return Edit(
            rule=context.rule,
            pass_name=self.name,
            site=weight if uses[0].bare else uses[0].path,
            summary=self.summary,
            adds=adds,
            uses={weight: "extend", prefix: "replace"},
            contract=self._contract(hosting.dtype),
            payload={
                "method": self.method,
                "prefix": prefix,
                "places": [
                    [use.path, use.hosting.parameter, use.hosting.host, use.bare] for use in uses
                ],
                "matrix": matrix_data(hosting.matrix),
                "dtype": dtype,
                "slices": {name: [list(pair) for pair in pairs] for name, pairs in slices.items()},
            },
            notes=self._notes(site, uses),
            reversible=self.keep_base != "none" or self._touches != "changes",
        )

    def _contract(self, dtype: torch.dtype) -> Contract:
        """What is promised of a weight of a dtype."""
        if not self.splits:
            return Contract("exact")
        # Inputs that are dropped are dropped from a part of the weight.
        return Contract("changes") if self.dropout else CLOSE[dtype]

    def edited(self, edit: Edit) -> Edit:
        """An edit of another method at the same place, as this one would have planned it."""
        matrix, slices = matrix_of(edit), slices_of(edit)
        adds: dict[str, TensorSpec] = {}
        for name, part in parts_of(edit.payload["prefix"], matrix, slices):
            adds.update(self._specs(name, part, edit.payload["dtype"]))
        return dataclasses.replace(
            edit,
            summary=self.summary,
            adds=adds,
            contract=Contract("exact"),
            payload={**edit.payload, "method": self.method},
            reversible=True,
        )

    def _specs(self, prefix: str, matrix: Matrix, dtype: str) -> dict[str, TensorSpec]:
        """Name → spec of the tensors of one adapter."""
        tensors = self.kind.tensors(matrix, self.rank)
        constants = self.kind.constants(matrix, self.rank, self.made_with)
        adds = {f"{prefix}.{name}": TensorSpec(shape, dtype) for name, shape in tensors.items()}
        for name, shape in constants.items():
            adds[f"{prefix}.{name}"] = TensorSpec(shape, dtype, trainable=False)
        return adds

    def _check(self, site: Site, uses: tuple[Use, ...]) -> None:
        """Raise if an option does not suit one of the uses of the site's weight."""
        method = self.kind
        if self.init != "kaiming" and self.init not in method.inits:
            raise RuleError(
                f"method {self.method!r} does not draw its factors, so init: {self.init} means "
                "nothing to it",
                hint="leave init out",
            )
        for use in uses:
            check_free(use.module, use.path)
            if self.dropout and not use.hosting.takes_dropout:
                raise RuleError(
                    f"{_label(use)} is adapted through its weight, so there is no input that "
                    f"dropout {self.dropout:g} could drop",
                    hint="give this site a rule of its own with dropout: 0",
                )
            if not use.hosting.readable and (how := self._touches):
                raise RuleError(
                    f"method {self.method!r} {how} the weight, and that of {_label(use)} is "
                    "quantised, parametrised or the dual of a mirror map",
                    hint=self._without_touching,
                )
            if method.scales_rows and use.hosting.host == "embedding":
                raise RuleError(
                    f"method {self.method!r} scales whole rows, which an embedding "
                    f"({_label(use)}) does not support",
                    hint="leave embeddings out with except:, or use method: lora",
                )
        if self.slices and uses[0].hosting.matrix.stack:
            raise RuleError(f"{site.path} holds a stack of matrices, which has no slices")
        if method.folds_weight and len(uses) > 1:
            paths = " and ".join(_label(use) for use in uses)
            raise RuleError(
                f"method {self.method!r} adds to the weight while it is trained, and {paths} share "
                "one",
                hint="leave it out with except:, untie it, or use a method that leaves the weight "
                "as it is, such as reflora",
            )

    def _check_source(self, context: PlanContext) -> None:
        """Raise if the weights are to be read again and cannot be."""
        if self.keep_base != "source" or self._touches != "changes":
            return
        why = why_not_again(context.model)
        if why is not None:
            raise RuleError(
                f"keep_base: source reads the weights again to undo method {self.method!r}, but "
                f"{why}",
                hint="load the model with surgery.load, or use keep_base: memory",
            )

    def _check_others(self, use: Use, context: PlanContext) -> None:
        """Raise if the method does not go together with what is beside the weight already."""
        touches = self._touches
        bank = bank_of(use.module, use.hosting.parameter)
        if touches and bank is not None and bank.merged is not None:
            raise Conflict(
                f"method {self.method!r} {touches} the weight of {_label(use)}, into which "
                "adapters are merged",
                hint="call surgery.adapters.unmerge(model) first",
            )
        weight = joined(use.path, use.hosting.parameter)
        if touches and any(f"the mirror map of {weight}" in edit.uses for edit in context.earlier):
            raise Conflict(
                f"method {self.method!r} {touches} {weight}, which an earlier rule makes the dual "
                "of a mirror map",
                hint=self._without_touching,
            )
        beside = [
            edit for edit in context.earlier if weight in edit.uses and "method" in edit.payload
        ]
        planned = [method_named(edit.payload["method"]) for edit in beside]
        scaling = any(method.scales_rows for method in planned)
        present = () if bank is None else bank.adapters.values()
        if touches == "changes" and (scaling or any(each.scales_rows for each in present)):
            raise Conflict(
                f"method {self.method!r} changes the weight of {_label(use)}, beside which another "
                "adapter measures the norms of its rows",
                hint="put the other one in afterwards",
            )
        folding = any(method.folds_weight for method in planned)
        folding = folding or any(m.folds_weight for each in present for m in each.methods)
        if folding and (self.kind.folds_weight or self.kind.scales_rows):
            does = "adds to" if self.kind.folds_weight else "measures the norms of the rows of"
            raise Conflict(
                f"method {self.method!r} {does} the weight of {_label(use)}, which another adapter "
                "adds to while it is trained",
                hint="undo or merge that one first",
            )
        # What its options make a method take out of the weight is not exact any more.
        changed = any(method.folds_weight for method in planned)
        changed = changed or any(edit.contract.kind != "exact" for edit in beside)
        before = changed or any(each.beginning is not None for each in present)
        if touches == "changes" and self.keep_base == "source" and before:
            raise Conflict(
                f"another adapter changes the weight of {_label(use)} too, so what "
                f"{self.method!r} starts from cannot be read again from the source",
                hint="use keep_base: memory",
            )

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
        return {name: ranges_of(role.slices[name]) for name in self.slices}

    def _notes(self, site: Site, uses: tuple[Use, ...]) -> tuple[str, ...]:
        notes: list[str] = []
        weight = own_parameters(uses[0].module).get(uses[0].hosting.parameter)
        starts_from_it = self.splits or self.kind.reads_weight
        if weight is not None and weight.is_meta and starts_from_it:
            notes.append(self._waiting)
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
        """The adapter of an edit, with its first values unless they follow."""
        weight = own_parameters(module).get(places_of(edit)[0].parameter)
        made = {
            name: self.kind(
                matrix,
                rank=self.rank,
                scaling=self.factor,
                dropout=self.dropout,
                options=self.made_with,
                device=_device(module, weight),
                dtype=getattr(torch, edit.payload["dtype"]),
            )
            for name, matrix in parts_of(edit.payload["prefix"], matrix_of(edit), slices_of(edit))
        }
        if not context.values_follow:
            self._start(edit, made, weight, context)
        return whole(edit, made)

    @property
    def _waiting(self) -> str:
        """What is noted of an edit whose weight has no values yet."""
        return (
            f"{self.method} starts from the weight, which is on the meta device: call "
            "surgery.adapters.start(model) once its values are there"
        )

    def needs(self, edit: Edit) -> tuple[str, ...]:
        """The weight, where the method reads or changes it."""
        place = places_of(edit)[0]
        return (joined(place.path, place.parameter),) if self._touches else ()

    def keeps(self, edit: Edit) -> tuple[str, ...]:
        """The weight, where a part is taken out of it and undo is done from memory."""
        return self.needs(edit) if self.splits and self.keep_base == "memory" else ()

    def begin(self, model: nn.Module, edit: Edit, context: ApplyContext) -> Edit:
        """Give an adapter that was put in on the meta device its first values.

        Raises:
            ModelStateError: the adapter is still on the meta device, or the weight that it starts
                from, or that does not suit the method.
        """
        place = places_of(edit)[0]
        module = context.module(model, place.path)
        weight = own_parameters(module).get(place.parameter)
        bank = self.bank(model, edit, context)
        made = bank.adapters[self.adapter].methods
        read = [] if weight is None or not self._touches else [weight]
        if any(tensor.is_meta for tensor in (*bank.adapters[self.adapter].parameters(), *read)):
            raise ModelStateError(
                f"{edit.site} is still on the meta device, so its adapter cannot start",
                hint="call model.to_empty(device=...) and load the weights first",
            )
        names = [
            name for name, _ in parts_of(edit.payload["prefix"], matrix_of(edit), slices_of(edit))
        ]
        original = self._digest(weight)
        self._start(edit, dict(zip(names, made, strict=True)), weight, context)
        if original is not None:
            bank.originals[self.adapter] = original
        bank.pending -= {self.adapter}
        return dataclasses.replace(
            edit, notes=tuple(note for note in edit.notes if note != self._waiting)
        )

    def _start(
        self,
        edit: Edit,
        made: Mapping[str, Method],
        weight: nn.Parameter | None,
        context: ApplyContext,
    ) -> None:
        """Give the tensors of an edit their first values, and the weight what is left of it."""
        reads = weight is not None and bool(self._touches)
        bases = rows_of(weight, edit) if weight is not None and reads else [None] * len(made)
        left: list[Tensor] = []
        for (name, adapter), base in zip(made.items(), bases, strict=True):
            with context.generator(name) as generator:
                rest = told_of(edit, adapter.start, self.init, generator, base)
            if rest is not None:
                left.append(rest)
        if weight is None or weight.is_meta:
            return
        if self.splits:
            self._keep(edit, weight, context)
            write_rows(weight, edit, left)

    def _keep(self, edit: Edit, weight: nn.Parameter, context: ApplyContext) -> None:
        """Copy the weight for undo, unless an edit of this application has already."""
        place = places_of(edit)[0]
        name = joined(place.path, place.parameter)
        if self.keep_base == "memory" and name not in context.kept:
            context.kept[name] = weight.detach().clone()

    def _digest(self, weight: nn.Parameter | None) -> str | None:
        """What the weight is known by when it is read again from the source, if it will be."""
        if self.keep_base != "source" or self._touches != "changes":
            return None
        return None if weight is None or weight.is_meta else digest_of(weight.detach())


def _label(use: Use) -> str:
    return joined(use.path, use.hosting.parameter) if use.bare else use.path


def _device(module: nn.Module, weight: Tensor | None) -> torch.device:
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


def _forget_kept(model: nn.Module, name: str) -> Tensor:
    """The copy of a weight from before merging that the edit log holds, removed from it."""
    operations = cast("Record", record_of(model)).operations
    for key in (name + BEFORE_MERGE, name):
        for each in operations:
            if key in each.kept:
                return each.kept.pop(key)
    raise KeyError(name)
