"""What was done to a model: edits as data, and the log of them that the model carries.

Everything here is JSON-able, so that the log survives ``deepcopy``, pickling and saving, and so
that ``restore`` can repeat the edits on a model built anew without selecting sites again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn

from surgery.errors import CheckpointError, ModelStateError
from surgery.tree import named_modules, named_parameters
from surgery.untrusted.paths import short

FORMAT = 1
ATTRIBUTE = "_surgery_record"

ContractKind = Literal["exact", "close", "changes"]
_WEAKEST_FIRST: tuple[ContractKind, ...] = ("changes", "close", "exact")


@dataclass(frozen=True)
class Contract:
    """What a pass promises about the model's outputs right after it is applied.

    ``exact``: ``torch.equal`` on finite outputs. ``close``: within ``rtol`` and ``atol``.
    ``changes``: the outputs are meant to change.
    """

    kind: ContractKind
    rtol: float = 0.0
    atol: float = 0.0

    def __str__(self) -> str:
        if self.kind == "close":
            return f"close (rtol {self.rtol:g}, atol {self.atol:g})"
        return self.kind

    @staticmethod
    def weakest(contracts: Iterator[Contract]) -> Contract:
        """The contract of several edits together: the least strict, with the widest bounds."""
        found = [Contract("exact"), *contracts]
        kinds = {contract.kind for contract in found}
        kind: ContractKind = next(kind for kind in _WEAKEST_FIRST if kind in kinds)
        return Contract(kind, max(c.rtol for c in found), max(c.atol for c in found))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor an edit adds. ``dtype`` is torch's name without the prefix, such as ``float32``."""

    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        found: object = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"the edit log names the dtype {short(repr(self.dtype))}")
        return found


#: How an edit uses something of the model. Two ``extend`` commute, anything else does not.
Use = Literal["extend", "replace"]


@dataclass(frozen=True)
class Edit:
    """One planned change at one site.

    Attributes:
        rule: Id of the rule that asked for it.
        pass_name: Name of the pass that carries it out.
        site: Dotted path of the module, or of the bare parameter, that is edited.
        summary: The change in a few words, for the plan's table.
        adds: Full dotted name → spec of every tensor that is added.
        uses: What it touches → how; two edits whose uses do not commute are a conflict.
        contract: What it promises.
        payload: What the pass needs to carry it out again, JSON-able.
        notes: Things the person should know, such as a weight that is shared.
        reversible: Whether undo can take it back.
        removes: Full dotted names of the tensors that it takes away, which earlier edits added.
    """

    rule: str
    pass_name: str
    site: str
    summary: str
    adds: Mapping[str, TensorSpec]
    uses: Mapping[str, Use]
    contract: Contract
    payload: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    reversible: bool = True
    removes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Edit:
        """Back from ``to_dict``. Raises KeyError or TypeError when the data does not fit."""
        fields = dict(data)
        fields["adds"] = {
            name: TensorSpec(tuple(spec["shape"]), spec["dtype"], spec["trainable"])
            for name, spec in fields["adds"].items()
        }
        fields["contract"] = Contract(**fields["contract"])
        fields["notes"] = tuple(fields["notes"])
        fields["removes"] = tuple(fields.get("removes", ()))  # absent in logs of version 0.1
        return cls(**fields)


@dataclass
class Operation:
    """One ``apply``: the recipe, its edits in order, and what undo must put back.

    Attributes:
        recipe: The recipe as data, with every rule's id and options.
        edits: What was done, in order.
        frozen: Parameters whose ``requires_grad`` was True and was turned off.
        kept: Stock tensors a pass changed and keeps a copy of (``keep_base: memory``).
        state: Index of an edit → what was switched there since, as of the last save.
    """

    recipe: dict[str, Any]
    edits: list[Edit]
    frozen: list[str] = field(default_factory=list[str])
    kept: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    state: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data, without the kept tensors."""
        return {
            "recipe": self.recipe,
            "edits": [edit.to_dict() for edit in self.edits],
            "frozen": self.frozen,
            "kept": sorted(self.kept),
            "state": self.state,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Operation:
        """Back from ``to_dict``."""
        return cls(
            recipe=dict(data["recipe"]),
            edits=[Edit.from_dict(edit) for edit in data["edits"]],
            frozen=list(data["frozen"]),
            state=dict(data["state"]),
        )


@dataclass
class Record:
    """The edit log of a model: its operations in the order they were applied."""

    operations: list[Operation] = field(default_factory=list[Operation])

    @property
    def edits(self) -> list[Edit]:
        """Every edit in force, in order."""
        return [edit for operation in self.operations for edit in operation.edits]

    @property
    def added(self) -> dict[str, str]:
        """Name of every tensor that the edits in force added → id of the rule that did.

        Those that a later edit removed are left out.
        """
        found: dict[str, str] = {}
        for edit in self.edits:
            found.update(dict.fromkeys(edit.adds, edit.rule))
            for name in edit.removes:
                found.pop(name, None)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data with the format's version."""
        return {"format": FORMAT, "operations": [each.to_dict() for each in self.operations]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Back from ``to_dict``.

        Raises:
            CheckpointError: the data is of a newer format or does not have its shape.
        """
        version = data.get("format")
        if version != FORMAT:
            raise CheckpointError(
                f"the edit log has format {version!r}; this version reads format {FORMAT}",
                hint="install the version of model-surgery that wrote it, or a newer one",
            )
        try:
            return cls([Operation.from_dict(each) for each in data["operations"]])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the edit log is damaged: {short(repr(error))}") from None


def record_of(model: nn.Module) -> Record | None:
    """The edit log of a model, or None if nothing was ever applied to it."""
    return cast("Record | None", model.__dict__.get(ATTRIBUTE))


def rewritten(model: nn.Module) -> tuple[nn.Module, Record]:
    """The rewritten model in a model or in what wraps it, with its edit log.

    Raises:
        ModelStateError: no module of it carries an edit log.
    """
    for _, module in named_modules(model, duplicates=False):
        record = record_of(module)
        if record is not None:
            return module, record
    raise ModelStateError(
        f"this {type(model).__name__} carries no edit log",
        hint="pass the whole model that surgery.apply was given, or what wraps it",
    )


def set_record(model: nn.Module, record: Record | None) -> None:
    """Put an edit log on a model; None, or one without operations, removes it."""
    if record is None or not record.operations:
        model.__dict__.pop(ATTRIBUTE, None)
        return
    model.__dict__[ATTRIBUTE] = record


def added_names(model: nn.Module) -> dict[str, str]:
    """Every name of what rewrites added, further ones of tied tensors included → the rule's id."""
    rules = (record_of(model) or Record()).added
    if not rules:
        return {}
    parameters = dict(named_parameters(model))
    by_id = {id(parameters[name]): rule for name, rule in rules.items() if name in parameters}
    tied = {name: by_id[id(each)] for name, each in parameters.items() if id(each) in by_id}
    return {**rules, **tied}
