"""``surgery.load_adapter``: an adapter of PEFT or diffusers as adapters of this library."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from surgery.checkpoints.inventory import places, take
from surgery.editing import undo
from surgery.errors import CheckpointError, RuleError
from surgery.interchange import folder as files
from surgery.interchange import layout
from surgery.interchange.folder import Entry, Source
from surgery.interchange.layers import site_of
from surgery.passes.hosts import Place, hosting_of
from surgery.passes.lowrank import LowRank
from surgery.passes.payload import matrix_of, places_of
from surgery.planning import Plan, plan
from surgery.record import Edit
from surgery.rules import Path, Recipe, Rule
from surgery.select.sites import is_layer
from surgery.table import some
from surgery.tree import joined, named_modules, named_parameters, own_parameters

_SPECIAL = re.compile(r"[*?\[\]{}]")
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter: str = "default",
    prefix: str | None = None,
) -> nn.Module:
    """Put an adapter that PEFT or diffusers wrote beside the weights of a model, in place.

    It becomes a rewrite like any other: ``surgery.undo`` takes it out, ``surgery.save`` saves it,
    it can be mixed, merged, trained on and exported. LoRA, rsLoRA, DoRA, and PiSSA and OLoRA with
    or without conversion are read, on layers and on parameters (``target_parameters``), with ranks
    and scalings of their own for some layers.
    Stock weights that were trained along (``modules_to_save``, ``bias``) are put into the model,
    require gradients afterwards, and keep their values when the adapter is undone.

    Everything is read and checked before the model is touched. Nothing is ever unpickled.

    Args:
        model: The model that the adapter was trained beside, with the same weights.
        folder: A folder of PEFT (``adapter_config.json``, ``adapter_model.safetensors``) or of
            diffusers (``pytorch_lora_weights.safetensors``), or such a file of diffusers.
        adapter: Name that the adapter gets.
        prefix: Which part of a pipeline's file is for this model, such as ``unet``; found by the
            layers' names where not given.

    Returns:
        The same object. The adapter is active, beside those that were active before.

    Raises:
        CheckpointError: there is no adapter; it is damaged, pickled, holds NaN, or is of another
            kind; or it belongs to another model, with the first names and shapes that differ. The
            model is as it was then.
        Conflict: the model has an adapter of this name at one of the layers.
        ModelStateError: the model is compiled, wrapped or offloaded.
    """
    read = prepare(model, folder, adapter=adapter, prefix=prefix)
    _refuse_meta(model, read.plan)
    read.plan.apply()
    try:
        _fill(model, read.values, read.source)
    except BaseException:
        undo(model, last=1)
        raise
    return model


@dataclass(frozen=True)
class Prepared:
    """An adapter that was read and fits, and is not in the model yet.

    Attributes:
        source: What was read.
        plan: Puts such an adapter into the model.
        values: Full name of every tensor that the plan adds → its value.
    """

    source: Source
    plan: Plan
    values: dict[str, Tensor]


def prepare(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter: str = "default",
    prefix: str | None = None,
) -> Prepared:
    """Read and check what ``load_adapter`` loads. The model may lie on the meta device.

    Copies of adapted base weights that came along are compared with the model's only where those
    have values.
    """
    source = files.read(FilePath(folder), _paths(model), prefix)
    targets = _targets(model, source)
    _check_stock(model, source)
    planned = _plan(model, source, targets, adapter)
    return Prepared(source, planned, _values(model, source, planned, targets))


def _refuse_meta(model: nn.Module, planned: Plan) -> None:
    modules = dict(named_modules(model))
    for edit in planned.edits:
        for place in places_of(edit):
            weight = own_parameters(modules[place.path]).get(place.parameter)
            if weight is not None and weight.is_meta:
                raise CheckpointError(
                    f"{edit.site} is on the meta device, where an adapter has no values",
                    hint="load the model's weights first",
                )


@dataclass(frozen=True)
class _Target:
    """One adapted layer of the file, and where it goes.

    Attributes:
        entry: Its tensors.
        module: The module in the model.
        parameter: The adapted parameter, of those that ``target_parameters`` names; else None.
        site: What a rule calls it.
        rule: Everything in which layers of one rule agree.
    """

    entry: Entry
    module: nn.Module
    parameter: str | None
    site: str
    rule: tuple[int, float, float, str | None]

    @property
    def name(self) -> str:
        """What PEFT's patterns are matched with."""
        return joined(self.entry.path, self.parameter or "")


def _paths(model: nn.Module) -> list[str]:
    return [path for path, _ in named_modules(model)]


def _targets(model: nn.Module, source: Source) -> list[_Target]:
    """Every layer of the file with its module.

    Raises:
        CheckpointError: the model lacks one.
    """
    modules = dict(named_modules(model))
    absent = [entry.path for entry in source.entries if entry.path not in modules]
    if absent:
        first, *_ = (path for path in modules if path and not _holds_others(modules[path]))
        raise CheckpointError(
            f"{source.where} belongs to another model: this {type(model).__name__} has no "
            f"{some(absent)} ({len(absent)} of {len(source.entries)} layers)",
            hint=f"its layers are called {first} and so on; pass the model, or the part of it, "
            "that the adapter was trained beside",
        )
    return [_target(modules[entry.path], entry, source) for entry in source.entries]


def _holds_others(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _target(module: nn.Module, entry: Entry, source: Source) -> _Target:
    parameter = _parameter(module, entry, source)
    weight = own_parameters(module).get(parameter or "weight")
    name = joined(entry.path, parameter or "")
    rank = _rank(entry, weight if parameter is not None else None, source)
    dropout = 0.0 if parameter or isinstance(module, nn.Embedding) else source.config.dropout
    return _Target(
        entry=entry,
        module=module,
        parameter=parameter,
        site=_site(entry.path, module, parameter),
        rule=(rank, source.config.alpha_of(name), dropout, _dtype(weight, entry)),
    )


def _parameter(module: nn.Module, entry: Entry, source: Source) -> str | None:
    """Which parameter of the module an entry adapts, by the order in which PEFT wraps them.

    The wrapper of the last parameter is the outermost.
    """
    own = [
        name
        for name in own_parameters(module)
        if _is_targeted(joined(entry.path, name), source.config.target_parameters or ())
    ]
    if not own:
        if entry.depth:
            raise CheckpointError(
                f"{source.where}: the layer {entry.path} is wrapped {entry.depth + 1} times, and "
                "target_parameters names none of its parameters"
            )
        return None
    if entry.depth >= len(own):
        raise CheckpointError(
            f"{source.where}: {entry.path} is wrapped {entry.depth + 1} times, and "
            f"target_parameters names {len(own)} of its parameters ({', '.join(own)})"
        )
    return own[-1 - entry.depth]


def _is_targeted(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _rank(entry: Entry, parameter: Tensor | None, source: Source) -> int:
    """The rank, from the shape of A; that of a stack of experts has all of theirs."""
    first = entry.tensors.get(layout.LINEAR[0], entry.tensors.get(layout.EMBEDDING[0]))
    if first is None:
        raise CheckpointError(f"{source.where}: the layer {entry.path} has no lora_A")
    experts = parameter.shape[0] if parameter is not None and parameter.dim() == 3 else 1
    if first.shape[0] % experts:
        raise CheckpointError(
            f"{source.where}: the lora_A of {entry.path} has {first.shape[0]} rows, which "
            f"{experts} experts cannot share"
        )
    return first.shape[0] // experts


def _site(path: str, module: nn.Module, parameter: str | None) -> str:
    return path if parameter is None or is_layer(module) else joined(path, parameter)


def _dtype(weight: Tensor | None, entry: Entry) -> str | None:
    """The dtype that holds the file's numbers; None where it is that of the weight."""
    dtype = next(iter(entry.tensors.values())).dtype
    for tensor in entry.tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    if weight is not None and weight.dtype in _FLOATING:
        dtype = torch.promote_types(dtype, weight.dtype)
        if dtype == weight.dtype:
            return None
    return str(dtype).removeprefix("torch.")


def _check_stock(model: nn.Module, source: Source) -> None:
    """Raise unless the stock tensors that came along fit the model.

    Raises:
        CheckpointError: the model lacks one, its shape differs, or an adapted weight is another.
    """
    where = {name: place.tensor for name, place in places(model) if place.persistent}
    for name, tensor in {**source.base, **source.stock}.items():
        if name not in where:
            raise CheckpointError(
                f"{source.where} also holds the stock tensor {name}, which this "
                f"{type(model).__name__} does not have",
                hint="pass the model that the adapter was trained beside",
            )
        if where[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source.where} holds {name} with shape {list(tensor.shape)}, the model's is "
                f"{list(where[name].shape)}",
                hint="pass the model that the adapter was trained beside; if its vocabulary was "
                "resized, resize the model's first",
            )
    _check_ties(model, source)
    for name, tensor in source.base.items():
        present = where[name].detach()
        if not present.is_meta and not torch.equal(present.cpu().to(tensor.dtype), tensor):
            raise CheckpointError(
                f"{source.where} holds another base weight for {name} than the model's",
                hint="pass the model that the adapter was trained beside",
            )


def _check_ties(model: nn.Module, source: Source) -> None:
    """Raise if a stock tensor came along for one of its names and not for another.

    PEFT unties a module whose weights it saves; here it would change the other module as well.
    """
    for alias, name in take(model).ties.items():
        one, other = source.stock.get(alias), source.stock.get(name)
        if one is None and other is None:
            continue
        if one is None or other is None or not torch.equal(one, other):
            raise CheckpointError(
                f"{source.where} holds trained weights for {name if one is None else alias}, which "
                f"is one tensor with {alias if one is None else name} in this model",
                hint="untie them first, for example with tie_word_embeddings=False in the config",
            )


def _plan(model: nn.Module, source: Source, targets: Sequence[_Target], adapter: str) -> Plan:
    recipe = _recipe(model, source, targets, adapter)
    try:
        return plan(model, recipe)
    except RuleError as error:
        raise CheckpointError(
            f"{source.where} does not fit this {type(model).__name__}: {error.message}",
            hint=error.hint,
        ) from error


def _recipe(model: nn.Module, source: Source, targets: Sequence[_Target], adapter: str) -> Recipe:
    """The rules that put such adapters in: one for all layers that agree."""
    groups: dict[tuple[int, float, float, str | None], list[str]] = {}
    for target in targets:
        groups.setdefault(target.rule, []).append(target.site)
    names = [*_paths(model), *(name for name, _ in named_parameters(model))]
    rules: list[Rule] = []
    for (rank, alpha, dropout, dtype), sites in groups.items():
        options = {
            "method": source.config.method,
            "rank": rank,
            "alpha": alpha,
            "scaling": "rslora" if source.config.rslora else "standard",
            "dropout": dropout,
            "adapter": adapter,
            "dtype": dtype,
        }
        rules.append(_built(source, options, Path(*_patterns(sites, names))))
    return Recipe(rules=rules, recipe="adapter")


def _built(source: Source, options: Mapping[str, object], where: object) -> Rule:
    try:
        # Optional: what no rule reaches is told by its name and its reason.
        return Rule(LowRank(**options), where=where, optional=True)  # type: ignore[arg-type]
    except RuleError as error:
        raise CheckpointError(
            f"{source.where} cannot be loaded: {error.message}", hint=error.hint
        ) from error


def _patterns(sites: Sequence[str], names: Iterable[str]) -> list[str]:
    """Path patterns for sites: with ``*`` for numbers where that means these sites alone."""
    known = [name.split(".") for name in names]
    wanted = set(sites)
    found: dict[str, None] = {}
    for site in sites:
        parts = site.split(".")
        general = ["*" if part.isdigit() else part for part in parts]
        alike = {".".join(name) for name in known if _fits(general, name)}
        if alike <= wanted and not _SPECIAL.search(site):
            found[".".join(general)] = None
        else:
            found[f"re:{re.escape(site)}" if _SPECIAL.search(site) else site] = None
    return list(found)


def _fits(general: Sequence[str], name: Sequence[str]) -> bool:
    return len(general) == len(name) and all(
        part in ("*", other) for part, other in zip(general, name, strict=True)
    )


def _values(
    model: nn.Module, source: Source, planned: Plan, targets: Sequence[_Target]
) -> dict[str, Tensor]:
    """Full name of every tensor that the plan adds → its value.

    Raises:
        CheckpointError: a tensor is of another shape, or layers share a weight and the file does
            not say the same of all of them.
    """
    by_site = {target.site: target for target in targets}
    _check_covered(source, planned, by_site)
    values: dict[str, Tensor] = {}
    for edit in planned.edits:
        uses = places_of(edit)
        missing = [site_of(use) for use in uses if site_of(use) not in by_site]
        if missing:
            present = next(site_of(use) for use in uses if site_of(use) in by_site)
            raise CheckpointError(
                f"{source.where} adapts {present} and not {missing[0]}, which share one weight in "
                "this model",
                hint="untie them first, for example with tie_word_embeddings=False in the config",
            )
        read = [_read(model, source, edit, use, by_site[site_of(use)]) for use in uses]
        for use, other in zip(uses[1:], read[1:], strict=True):
            if any(not torch.equal(read[0][name], other[name]) for name in read[0]):
                raise CheckpointError(
                    f"{source.where} adapts {site_of(uses[0])} and {site_of(use)} in different "
                    "ways, which share one weight in this model",
                    hint="untie them first, for example with tie_word_embeddings=False",
                )
        values |= read[0]
    return values


def _check_covered(source: Source, planned: Plan, by_site: Mapping[str, _Target]) -> None:
    """Raise if a layer of the file is none that can be adapted here.

    Raises:
        CheckpointError: the plan leaves it out.
    """
    covered = {site_of(use) for edit in planned.edits for use in places_of(edit)}
    left_out = next((site for site in by_site if site not in covered), None)
    if left_out is not None:
        target = by_site[left_out]
        why = hosting_of(target.module, target.parameter, read_outside=False)
        raise CheckpointError(
            f"{source.where} adapts {left_out}, a {type(target.module).__name__}, which cannot be "
            f"adapted here: {why if isinstance(why, str) else 'no rule reaches it'}"
        )


def _read(
    model: nn.Module, source: Source, edit: Edit, use: Place, target: _Target
) -> dict[str, Tensor]:
    matrix = matrix_of(edit)
    try:
        kind = layout.kind_of(use.host, target.module, matrix)
        if target.parameter is not None:
            kind = "parameter"
        elif source.config.splits and (kind != "linear" or matrix.transposed):
            raise ValueError(f"{source.config.method!r} splits the weights of nn.Linear alone")
        elif kind == "parameter":
            raise ValueError(
                "PEFT adds to the output of its forward, and what uses its weight here is "
                "something else"
            )
        A, B, magnitude = layout.factors(kind, target.module, matrix, target.entry.tensors)
    except ValueError as error:
        raise CheckpointError(
            f"{source.where} does not fit this {type(model).__name__} at {target.name}: {error}"
        ) from None
    prefix = edit.payload["prefix"]
    found = {f"{prefix}.lora_A": A, f"{prefix}.lora_B": B}
    if magnitude is not None:
        found[f"{prefix}.{layout.MAGNITUDE}"] = magnitude
    expected = {name for name, spec in edit.adds.items() if spec.trainable}
    if found.keys() != expected:
        odd = min(found.keys() ^ expected)
        side = "has" if odd in found else "lacks"
        raise CheckpointError(f"{source.where} {side} {odd.rpartition('.')[2]} of {target.name}")
    return found


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Tensor], source: Source) -> None:
    parameters = dict(named_parameters(model))
    for name, value in values.items():
        parameters[name].copy_(value)
    where = dict(places(model))
    for name, value in source.stock.items():
        where[name].tensor.copy_(value)
        if where[name].is_parameter:
            parameters[name].requires_grad_(True)
