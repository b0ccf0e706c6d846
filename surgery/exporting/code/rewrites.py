"""What of a rewritten model has to be said in code: other methods, shortcuts, adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

from architectures.shortcuts import Topology
from surgery.capture.graft import grafts, stock_class
from surgery.capture.loops import loops_of
from surgery.errors import ExportError
from surgery.passes.base import passes_of
from surgery.passes.freeze import Freeze
from surgery.passes.hosts import CHILD, HOSTS, Bank, Banks
from surgery.passes.lowrank import LowRank
from surgery.passes.shortcuts import Shortcuts
from surgery.passes.streams import Segment, segments_of
from surgery.passes.streams.holders import DictHolder, ListHolder
from surgery.record import Edit, Record, record_of
from surgery.save_guard import GuardedModel, GuardedPart, not_baked, to_settle
from surgery.sources import describe, rebuild
from surgery.tree import children, joined, named_modules, named_parameters, own_parameters

_HOLDERS = {ListHolder: "LayerList", DictHolder: "LayerDict"}
_HOSTS = {host: name for name, host in HOSTS.items()}
_WRITTEN = frozenset({Shortcuts.name, Freeze.name, LowRank.name})
_ALIKE = "torch_export and onnx hold it"


@dataclass(frozen=True)
class Method:
    """A rewritten method.

    Attributes:
        name: Its name.
        source: Its text, decorators included, at any indentation.
        function: The function it stands for, whose module has the names it uses.
    """

    name: str
    source: str
    function: FunctionType


@dataclass(frozen=True)
class Reclassed:
    """A module whose class gets other methods.

    Attributes:
        path: Of the module.
        base: Its stock class.
        holder: What hides the shortcuts among its children: ``LayerList``, ``LayerDict`` or "".
        host: What reads the adapters of its weights, a key of ``hosts.HOSTS``, or "".
        methods: The rewritten ones.
    """

    path: str
    base: type[nn.Module]
    holder: str = ""
    host: str = ""
    methods: tuple[Method, ...] = ()


@dataclass(frozen=True)
class Rewired:
    """The shortcuts of a run of layers.

    Attributes:
        holder: Path of the module that has the layers.
        number: Under which name of ``holder.shortcuts``.
        segment: The module in the model.
        arguments: What its topology is made with.
    """

    holder: str
    number: str
    segment: Segment
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Adapted:
    """A weight with adapters.

    Attributes:
        paths: Of the layers that have it, the first in the order of the state dict.
        bank: Its adapters.
        bare: Whether the layer has several weights.
        dtype: Of the weight; None if the layer holds it in a way of its own.
    """

    paths: tuple[str, ...]
    bank: Bank
    bare: bool
    dtype: torch.dtype | None

    def places(self) -> tuple[str, ...]:
        """Where the bank is, under each layer."""
        last = f"{CHILD}.{self.bank.parameter}" if self.bare else CHILD
        return tuple(joined(path, last) for path in self.paths)


@dataclass(frozen=True)
class Rewrites:
    """Everything that distinguishes a rewritten model from its stock class.

    Attributes:
        classes: Modules whose class changes.
        shortcuts: What is put beside layers.
        adapted: The weights with adapters.
        trained: Where stock parameters are frozen, the names of those that are not; else None.
        dropped: Names of tensors that add nothing any more, such as merged adapters.
        shared: Path of a module → that of the one that stands in its place too, where the stock
            class has two.
    """

    classes: tuple[Reclassed, ...] = ()
    shortcuts: tuple[Rewired, ...] = ()
    dropped: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict[str, str])
    adapted: tuple[Adapted, ...] = ()
    trained: frozenset[str] | None = None

    @property
    def any(self) -> bool:
        """Whether the architecture is another than the stock one."""
        return bool(self.classes or self.shortcuts or self.adapted or self.shared)


def obstacle(model: nn.Module) -> str | None:
    """Why the rewrites of a model cannot be written as code, or None."""
    try:
        rewrites_of(model)
    except ExportError as error:
        return error.message
    return None


def rewrites_of(model: nn.Module) -> Rewrites:
    """What of a model has to be written as code.

    Raises:
        ExportError: a rewrite is of a kind that has no text of its own.
    """
    record = record_of(model)
    if record is None:
        return Rewrites(shared=_shared(model))
    apart = not_baked(model, record)
    for edit in apart:
        if edit.pass_name not in _WRITTEN:
            way_out = to_settle(edit)
            raise ExportError(
                f"the {edit.pass_name} rewrite of {edit.site} is no text of its own; "
                f"{way_out + ', or export it as it is: ' if way_out else ''}{_ALIKE}"
            )
    baked = [edit for edit in record.edits if edit not in apart]
    dropped = frozenset(name for edit in baked for name in edit.adds)
    shortcuts, adapted = tuple(_shortcuts(model, record)), tuple(_adapted(model))
    classes = tuple(_classes(model)) if shortcuts or adapted else ()
    return Rewrites(classes, shortcuts, dropped, _shared(model), adapted, _trained(model, adapted))


def _shared(model: nn.Module) -> dict[str, str]:
    """The modules that are one in this model, and two in what its class makes."""
    described = describe(model)
    if described is None or not described.get("shared"):
        return {}
    stock = rebuild({**described, "shared": {}, "state": None}, device="meta")
    return {
        path: first
        for path, first in cast("dict[str, str]", described["shared"]).items()
        if stock.get_submodule(path) is not stock.get_submodule(first)
    }


def _adapted(model: nn.Module) -> Iterator[Adapted]:
    found: dict[int, Adapted] = {}
    for path, module in named_modules(model, duplicates=False):
        for bank, bare in _banks(module):
            known = found.get(id(bank))
            paths = (path,) if known is None else (*known.paths, path)
            # Not by its name: a layer that is read through its weight would form the changed one.
            weight = own_parameters(module).get(bank.parameter)
            dtype = None if weight is None else weight.dtype
            found[id(bank)] = Adapted(paths, bank, bare, dtype)
    return iter(found.values())


def _banks(module: nn.Module) -> Iterator[tuple[Bank, bool]]:
    """The adapters of a layer that are not merged, and whether it has several weights."""
    child = children(module).get(CHILD)
    bare = isinstance(child, Banks)
    for bank in children(child).values() if isinstance(child, Banks) else (child,):
        if isinstance(bank, Bank) and bank.merged is None:
            yield bank, bare


def _trained(model: nn.Module, adapted: tuple[Adapted, ...]) -> frozenset[str] | None:
    """Names of the stock parameters that require gradients, where others do not."""
    inserted = {id(each) for one in adapted for each in one.bank.parameters()}
    stock = [(n, p) for n, p in named_parameters(model, duplicates=False) if id(p) not in inserted]
    trained = [name for name, parameter in stock if parameter.requires_grad]
    return None if not adapted or len(trained) == len(stock) else frozenset(trained)


def _shortcuts(model: nn.Module, record: Record) -> Iterator[Rewired]:
    for operation in record.operations:
        passes = passes_of(operation)
        for edit in operation.edits:
            made_by = passes[edit.rule]
            if isinstance(made_by, Shortcuts):
                yield _rewired(model, edit, made_by)


def _rewired(model: nn.Module, edit: Edit, made_by: Shortcuts) -> Rewired:
    if "captured" in edit.payload or "blocks" in edit.payload or "cuts" in edit.payload:
        raise ExportError(
            f"the shortcuts of {edit.site} are in a captured graph, whose calls differ with their "
            f"arguments, and not in a text; {_ALIKE}"
        )
    holder, number = edit.payload["holder"], edit.payload["number"]
    found = segments_of(model.get_submodule(holder))
    segment = children(cast("nn.Module", found))[number]
    return Rewired(holder, number, cast("Segment", segment), made_by.topology_arguments())


def topology_of(rewired: Rewired) -> Topology:
    """The module that gives the coefficients."""
    return rewired.segment.topology


def _classes(model: nn.Module) -> Iterator[Reclassed]:
    for path, module in named_modules(model, duplicates=False):
        holder, host, methods = "", "", list[Method]()
        for mixin in grafts(module):
            if mixin in {GuardedModel, GuardedPart}:
                continue
            if mixin in _HOLDERS:
                holder = _HOLDERS[mixin]
                continue
            if mixin in _HOSTS:
                host = _HOSTS[mixin] if any(_banks(module)) else ""
                continue
            methods += _methods(path, stock_class(module), mixin)
        if holder or host or methods:
            yield Reclassed(path, stock_class(module), holder, host, tuple(methods))


def _methods(path: str, base: type[nn.Module], mixin: type) -> Iterator[Method]:
    where = path or base.__name__
    loops = loops_of(mixin)
    if loops is None:
        raise ExportError(f"{where} is rewritten by {mixin.__name__}, which is no text; {_ALIKE}")
    if loops.mixins != (mixin,) or issubclass(mixin, nn.Module):
        raise ExportError(
            f"methods of several base classes of {where} are rewritten, which one text cannot "
            f"say; {_ALIKE}"
        )
    for name in loops.methods:
        attribute: Any = cast("Any", mixin).__dict__[name]
        if not isinstance(attribute, FunctionType):
            raise ExportError(
                f"{where}.{name} is rewritten and no plain method, but a "
                f"{type(attribute).__name__}; {_ALIKE}"
            )
        function = cast("FunctionType", inspect.unwrap(attribute))
        yield Method(name, loops.sources[name], function)
