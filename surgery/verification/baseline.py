"""The model as it was, and as its edit log alone would make it: temporary copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from surgery.copies import same_bits, share_what_is_equal, sharing
from surgery.editing import repeat, undo
from surgery.errors import ContractBroken
from surgery.record import Operation, Record, record_of
from surgery.tree import named_modules, named_parameters, own_parameters
from surgery.verification.structure import tensor_named


@dataclass(frozen=True)
class Undone:
    """A copy of a model on which every rewrite was taken back.

    Attributes:
        model: The copy.
        moved: Names of stock parameters that are other objects after undo.
    """

    model: nn.Module
    moved: tuple[str, ...]


def undone(model: nn.Module, record: Record) -> Undone:
    """The model as it was before its rewrites, sharing every weight that they left alone.

    The weights of edited modules are copied while undo runs, since it may write to them, and
    given up again where they come out as they went in.

    Raises:
        ModelStateError: a rewrite cannot be undone, or the model cannot be copied.
        ContractBroken: undo wrote where no edit said it would.
    """
    copied = sharing(model, owned=writable(model, record))
    before = dict(named_parameters(copied))
    versions = _versions(model)
    undo(copied)
    _check_untouched(model, versions)
    after = dict(named_parameters(copied))
    moved = tuple(name for name in after if before.get(name) is not after[name])
    share_what_is_equal(copied, model)
    return Undone(copied, moved)


def applied_again(stock: nn.Module, record: Record) -> nn.Module:
    """A copy of the stock model on which the edit log was repeated, from fresh seeds.

    Raises:
        SurgeryError: the log cannot be repeated.
    """
    copied = sharing(stock, owned=writable(stock, record))
    # As just applied: what was switched or merged since is left out.
    repeat(copied, Record([Operation(each.recipe, each.edits) for each in record.operations]))
    share_what_is_equal(copied, stock)
    return copied


def writable(model: nn.Module, record: Record) -> set[str]:
    """Names of the stock parameters that applying or undoing the edits may write to."""
    names = {name for operation in record.operations for name in operation.kept}
    sites = {edit.site for edit in record.edits}
    for edit in record.edits:
        names.update(edit.uses)
    names |= sites
    for path, module in named_modules(model):
        if path in sites:
            names.update(f"{path}.{key}" if path else key for key in own_parameters(module))
    return names


def is_at_init(model: nn.Module, fresh: nn.Module, name: str) -> bool:
    """Whether an inserted tensor still holds what the edit log's seed gave it."""
    one, other = tensor_named(model, name), tensor_named(fresh, name)
    if one is None or other is None:
        return one is other
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return one.device.type == "meta" or same_bits(one.detach(), other.detach())


def was_at_init(model: nn.Module, fresh: nn.Module, name: str) -> bool:
    """Whether an inserted tensor that was taken away again had what the seed gave it.

    Both have the copy that undo puts back; without one nothing is known, which counts as no.
    """
    one, other = _kept(model, name), _kept(fresh, name)
    return one is not None and other is not None and same_bits(one, other)


def _kept(model: nn.Module, name: str) -> Tensor | None:
    operations = (record_of(model) or Record()).operations
    return next((each.kept[name] for each in operations if name in each.kept), None)


def _versions(model: nn.Module) -> dict[str, int]:
    return {
        name: parameter._version  # pyright: ignore[reportPrivateUsage]
        for name, parameter in named_parameters(model)
        if not parameter.is_inference()
    }


def _check_untouched(model: nn.Module, versions: Mapping[str, int]) -> None:
    """Raise if undo on the copy wrote to memory that the copy shares with the model."""
    record = record_of(model)
    now = _versions(model)
    written = [name for name in versions if now.get(name) != versions[name]]
    if written:
        passes = sorted({edit.pass_name for edit in record.edits} if record else ())
        raise ContractBroken(
            f"undo, run on a copy, wrote to {written[0]}, which no edit of {', '.join(passes)} "
            "names; the copy shares it with the model, which is changed now",
            hint="load the model again; the pass must name in Edit.uses what it writes to",
        )
