"""Carry planned edits out, and take them back: in place, all or nothing, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import ModelStateError
from surgery.passes.base import ApplyContext, Pass, in_force, passes_of, spared
from surgery.record import Edit, Operation, Record, record_of, set_record
from surgery.save_guard import check_unguardable, guard
from surgery.tree import named_parameters

# Forwards may run while a model is rewritten; two rewrites may not.
_lock = threading.RLock()


def carry_out(
    model: nn.Module,
    operation: Operation,
    passes: Mapping[str, Pass],
    *,
    values_follow: bool = False,
) -> None:
    """Apply an operation's edits in order and log it; undo all of them if one fails.

    Args:
        model: Rewritten in place.
        operation: What to do, from a plan or from a saved log. ``frozen`` and ``kept`` are
            filled in.
        passes: Rule id → the pass that does it.
        values_follow: Whether every tensor gets its value afterwards, from a checkpoint.
    """
    with _lock:
        seed = int(operation.recipe["seed"])
        context = ApplyContext(seed, operation.kept, values_follow=values_follow)
        takebacks: list[Callable[[], None]] = []
        try:
            for edit in operation.edits:
                passes[edit.rule].apply(model, edit, context)
                takebacks.append(_takeback(passes[edit.rule], model, edit, context))
            _freeze(model, operation, passes, takebacks)
            earlier = record_of(model) or Record()
            takebacks.append(lambda: guard(model, earlier.edits))
            guard(model, [*earlier.edits, *operation.edits])
        except BaseException:
            for take_back in reversed(takebacks):
                take_back()
            raise
        set_record(model, Record([*earlier.operations, operation]))


def repeat(model: nn.Module, record: Record, *, values_follow: bool = False) -> None:
    """Do again, on a model built anew, everything an edit log says was done.

    Args:
        model: A model as it was built.
        record: The log.
        values_follow: Whether every tensor gets its value afterwards, from a checkpoint.

    Raises:
        ModelStateError: the model has an edit log already.
    """
    if record_of(model) is not None:
        raise ModelStateError(
            "the model was rewritten already, so a saved edit log cannot be repeated on it",
            hint="pass a model as it was built",
        )
    for operation in record.operations:
        passes = passes_of(operation)
        again = Operation(operation.recipe, operation.edits)
        carry_out(model, again, passes, values_follow=values_follow)
        context = ApplyContext(int(operation.recipe["seed"]))
        for index, state in operation.state.items():
            edit = operation.edits[int(index)]
            passes[edit.rule].resume(model, edit, state, context)


def settle(model: nn.Module) -> None:
    """Change the stock tensors as applying did, from the values of what was inserted.

    For an adapter that was saved alone, loaded beside its stock weights.
    """
    for made, edit, context in in_force(record_of(model) or Record()):
        made.settle(model, edit, context)


def begin(model: nn.Module) -> None:
    """Give what was inserted on the meta device its first values; stock tensors have theirs.

    They are those that applying the recipes to the loaded model would have given.

    Raises:
        ModelStateError: an edit's values cannot be made, or a tensor that it needs has none.
    """
    for operation in (record_of(model) or Record()).operations:
        passes = passes_of(operation)
        context = ApplyContext(int(operation.recipe["seed"]), operation.kept)
        operation.edits = [
            passes[edit.rule].begin(model, edit, context) for edit in operation.edits
        ]


def originals(model: nn.Module, record: Record) -> dict[str, Tensor]:
    """Stock tensors as they were before any edit, of those that the log keeps no copy of."""
    found: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}
    for operation in reversed(record.operations):
        passes = passes_of(operation)
        context = ApplyContext(0, operation.kept, shared=shared)
        for edit in reversed(operation.edits):
            found.update(passes[edit.rule].originals(model, edit, context))
    return found


def note_state(model: nn.Module, record: Record) -> None:
    """Write into the log what was switched since the edits were applied, before it is saved."""
    for operation in record.operations:
        passes = passes_of(operation)
        context = ApplyContext(int(operation.recipe["seed"]))
        states = (
            (str(index), passes[edit.rule].state(model, edit, context))
            for index, edit in enumerate(operation.edits)
        )
        operation.state = {index: state for index, state in states if state is not None}


def bound(model: nn.Module, record: Record) -> list[Edit]:
    """The edits in force of which nothing is of use beside the original stock tensors."""
    return [edit for made, edit, context in in_force(record) if made.bound(model, edit, context)]


def undo(model: nn.Module, *, last: int | None = None) -> nn.Module:
    """Take back what was applied to a model, in place, newest first.

    What a rewrite added is removed and what it changed is put back bit for bit. Stock parameters
    that were trained meanwhile keep their trained values.

    Args:
        model: A model that ``apply`` rewrote.
        last: How many applications to take back; all of them by default.

    Returns:
        The same object.

    Raises:
        ModelStateError: nothing was applied, ``last`` is out of range, an edit cannot be taken
            back, or the model was wrapped since. The model is unchanged then.
    """
    with _lock:
        record = record_of(model)
        if record is None:
            raise ModelStateError(
                "nothing to undo: no rewrite was applied to this model",
                hint="pass the root module that surgery.apply was given",
            )
        count = len(record.operations) if last is None else last
        if not 1 <= count <= len(record.operations):
            raise ModelStateError(
                f"last={last} is out of range: {len(record.operations)} applications can be undone"
            )
        going = list(reversed(record.operations))[:count]
        shared: dict[str, Any] = {}
        for operation in going:
            _check_revertible(model, operation, shared)
        check_unguardable(model)
        for operation in going:
            _revert(model, operation, shared)
            left = Record(record.operations[: record.operations.index(operation)])
            set_record(model, left)
            guard(model, left.edits)
        return model


def _check_revertible(model: nn.Module, operation: Operation, shared: dict[str, Any]) -> None:
    lasting = [edit for edit in operation.edits if not edit.reversible]
    if lasting:
        raise ModelStateError(
            f"rule {lasting[0].rule!r} changed {lasting[0].site} for good ({lasting[0].summary})",
            hint="it was applied with keep_base: none; load the original model again",
        )
    context = ApplyContext(0, operation.kept, shared=shared)
    passes = passes_of(operation)
    for edit in operation.edits:
        passes[edit.rule].check_revertible(model, edit, context)


def _revert(model: nn.Module, operation: Operation, shared: dict[str, Any]) -> None:
    passes = passes_of(operation)
    context = ApplyContext(0, operation.kept, shared=shared)
    for edit in reversed(operation.edits):
        passes[edit.rule].revert(model, edit, context)
    parameters = dict(named_parameters(model))
    for name in operation.frozen:
        if name in parameters:  # else an edit whose log was forged had added it, and it is gone
            parameters[name].requires_grad_(True)


def _takeback(
    edited_by: Pass, model: nn.Module, edit: Edit, context: ApplyContext
) -> Callable[[], None]:
    return lambda: edited_by.revert(model, edit, context)


def _freeze(
    model: nn.Module,
    operation: Operation,
    passes: Mapping[str, Pass],
    takebacks: list[Callable[[], None]],
) -> None:
    """Turn gradients off where a pass wants it, and log which were on."""
    kept = spared(record_of(model) or Record(), operation.edits, passes)
    parameters = dict(named_parameters(model))
    wanted: dict[str, None] = {}
    for rule, made in passes.items():
        edits = [edit for edit in operation.edits if edit.rule == rule]
        wanted.update(dict.fromkeys(made.frozen(model, edits, kept)))
    for name in wanted:
        parameter = parameters[name]
        if parameter.requires_grad:
            takebacks.append(_thaw(parameter))
            parameter.requires_grad_(False)
            operation.frozen.append(name)


def _thaw(parameter: nn.Parameter) -> Callable[[], None]:
    def thaw() -> None:
        parameter.requires_grad_(True)

    return thaw
