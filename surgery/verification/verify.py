"""``surgery.verify``: measure a rewritten model against the model as it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from surgery import progress
from surgery.copies import is_sharded, sharing
from surgery.errors import ModelStateError, SourceError, SurgeryError
from surgery.record import Contract, Record, record_of
from surgery.sources import Example, infer_example, variants
from surgery.table import human_count
from surgery.tree import named_modules, named_parameters
from surgery.verification import structure
from surgery.verification.baseline import Undone, applied_again, is_at_init, undone, was_at_init
from surgery.verification.insertions import Probe
from surgery.verification.measure import Bounds, Measured, compare_runs, measure
from surgery.verification.report import Report, Row, Unchecked
from surgery.verification.runs import count_flops

NUMERIC = "outputs and gradients"


def verify(
    model: nn.Module,
    example: Any = None,
    *,
    baseline: nn.Module | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    gradients: bool = True,
) -> Report:
    """Measure a rewritten model against the model as it was before its rewrites.

    Compared are: every tensor of the output, at two shapes, in eval mode and in train mode with
    dropout on; the gradient of every parameter; state-dict keys, shapes, ties and parameter
    objects; buffers after a training step. That what was inserted takes part is shown by
    randomising it on a copy. Sizes, FLOPs and activation memory are measured before and after.
    The yardstick is the weakest contract among the edits in force. Once what was inserted has
    been trained no contract applies, and differences are reported as drift.

    The model is not changed: not its flags, gradients, buffers, nor any random generator.
    Copies share its weights. On top come the buffers; while undo runs on the copy, the weights
    of the edited modules; and, unless ``gradients=False``, gradients of all parameters twice.

    Args:
        model: A model that ``surgery.apply`` rewrote.
        example: A tensor, a tuple of positional or a dict of keyword arguments, or an
            ``Example``. Inferred where the model carries a config.
        baseline: The model as it was, to measure against instead of a copy on which the rewrites
            are undone; needed where they cannot be undone. Unchanged.
        rtol: Relative bound for the outputs instead of the contract's.
        atol: Absolute bound for the outputs instead of the contract's.
        gradients: Whether to compare gradients.

    Raises:
        ModelStateError: nothing was applied to the model and no baseline is given.
        ContractBroken: undo wrote to a weight that no edit names; see ``Report.check`` for
            everything else that is broken.
        SourceError: ``example`` is not something a model can be called with.
    """
    record = record_of(model)
    if record is None and baseline is None:
        raise _nothing_to_verify(model)
    check = _Verification(model, record or Record(), gradients=gradients)
    check.contract = _contract(check.record, rtol, atol)
    with progress.task("verifying"):
        check.weights()
        check.find_baseline(baseline)
        check.structure()
        check.drift()
        check.numbers(None if example is None else Example.coerce(example))
    contract = None if check.drifted else check.contract
    return Report(contract, tuple(check.rows), tuple(check.unchecked))


def _nothing_to_verify(model: nn.Module) -> ModelStateError:
    inside = next((path for path, part in named_modules(model) if record_of(part)), None)
    if inside is not None:
        return ModelStateError(
            f"the rewritten model is {inside!r} inside this {type(model).__name__}",
            hint=f"verify that: surgery.verify(model.{inside})",
        )
    return ModelStateError(
        "nothing to verify: no rewrite was applied to this model",
        hint="pass the root module that surgery.apply was given, or a baseline to compare with",
    )


def _contract(record: Record, rtol: float | None, atol: float | None) -> Contract:
    promised = Contract.weakest(edit.contract for edit in record.edits)
    if rtol is None and atol is None:
        return promised
    return Contract("close", rtol or 0.0, atol or 0.0)


@dataclass
class _Verification:
    """The state of one ``verify``: what is known so far, and what was found."""

    model: nn.Module
    record: Record
    gradients: bool
    contract: Contract = field(default_factory=lambda: Contract("exact"))
    rows: list[Row] = field(default_factory=list[Row])
    unchecked: list[Unchecked] = field(default_factory=list[Unchecked])
    stock: nn.Module | None = None
    fresh: nn.Module | None = None
    drifted: bool = False

    @property
    def added(self) -> list[str]:
        """Names of the tensors that the edits in force added, one for each tensor."""
        return list(self.record.added)

    @cached_property
    def inserted(self) -> frozenset[str]:
        """Every name of those tensors; one beside a tied weight has several."""
        tensors = dict(named_parameters(self.model))
        ids = {id(tensors[name]) for name in self.added if name in tensors}
        also = (name for name, tensor in tensors.items() if id(tensor) in ids)
        return frozenset((*self.added, *also))

    def skip(self, check: str, reason: str) -> None:
        """List something as unchecked."""
        self.unchecked.append(Unchecked(check, reason))

    def weights(self) -> None:
        """Look for NaN and infinity."""
        if self._on_meta():
            self.skip("finite weights", "the model is on the meta device")
            return
        self.rows.extend(structure.finite_weights(self.model))
        closed = structure.quantised(self.model)
        if closed:
            more = f" and {len(closed) - 1} more" if len(closed) > 1 else ""
            reason = f"quantised weights are not looked into: {closed[0]}{more}"
            self.skip("finite weights", reason)

    def find_baseline(self, given: nn.Module | None) -> None:
        """The model as it was: a copy of the given one, or a copy on which all is undone."""
        if given is not None:
            self.stock = sharing(given)
            self.skip("parameter identity", "the baseline was given, and is another object")
            return
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            self._without_baseline("its parameters are sharded over processes")
            return
        try:
            found = undone(self.model, self.record)
        except ModelStateError as error:
            self._without_baseline(error.message)
        else:
            self._keep(found)

    def _keep(self, found: Undone) -> None:
        self.stock = found.model
        count = len(dict(named_parameters(found.model, duplicates=False)))
        self.rows.append(structure.identity(found.moved, count))

    def _without_baseline(self, reason: str) -> None:
        why = f"no baseline to compare with ({reason}); pass baseline=the original model"
        for check in ("state-dict keys", "ties", "parameter identity", NUMERIC):
            self.skip(check, why)

    def structure(self) -> None:
        """Names, ties, classes and sizes."""
        if self.stock is not None:
            self._apply_again(self.stock)
            self.rows.extend(structure.keys(self.model, self.stock, self.inserted))
            self.rows.append(structure.ties(self.model, self.stock, self.inserted))
            self.rows.extend(structure.sizes(self.model, self.stock))
        self.rows.append(structure.log(self.model, self.record, self.fresh))

    def _apply_again(self, stock: nn.Module) -> None:
        try:
            self.fresh = applied_again(stock, self.record)
        except SurgeryError as error:
            self.skip("drift", f"the edits cannot be repeated on a copy: {error.message}")

    def drift(self) -> None:
        """Whether what was inserted still has its first values."""
        gone = [name for edit in self.record.edits for name in edit.removes]
        if self.fresh is None or not (self.added or gone):
            return
        moved = [name for name in self.added if not is_at_init(self.model, self.fresh, name)]
        moved += [name for name in gone if not was_at_init(self.model, self.fresh, name)]
        if not moved:
            self.rows.append(Row("inserted tensors", "equal", detail="as the seed made them"))
            return
        self.drifted = True
        count = len(self.added) + len(gone)
        detail = f"{len(moved)} of {count} changed since they were inserted"
        self.rows.append(Row("inserted tensors", "drift", where=moved[0], detail=detail))

    def numbers(self, given: Example | None) -> None:
        """Everything that takes a call of the model."""
        if self.stock is None:
            return
        if self._on_meta():
            self.skip(NUMERIC, "the model is on the meta device, where tensors have no values")
            self._on_paper(self.stock, given)
            return
        example = self._example(given)
        if example is None:
            return
        if not self.gradients:
            self.skip("gradients", "gradients=False")
        new = sharing(self.model)
        self._match_gradients(new, self.stock)
        modes = [(training, self.gradients) for training in (False, True)]
        base_eval: Measured | None = None
        for training, gradients in modes:
            measured = measure(self.stock, new, example, training=training, gradients=gradients)
            self._report(measured, "given shape")
            if not training:
                base_eval = measured
        self._other_shapes(new, self.stock, example)
        self._flops(new, self.stock, example)
        if base_eval is not None:
            self._insertions(example, base_eval)

    def _on_paper(self, stock: nn.Module, given: Example | None) -> None:
        """What shapes alone tell of a call."""
        try:
            example = infer_example(self.model) if given is None else given
        except SourceError as error:
            self.skip("FLOPs", f"no example to call the model with: {error.message}")
            return
        meta = torch.device("meta")
        # Models look at the values of masks, and meta has none; the count is the same without.
        calls = [example.to(meta), _without_masks(example).to(meta)]
        call = next((each for each in calls if count_flops(stock, each) is not None), calls[0])
        self._flops(sharing(self.model), stock, call)

    def _example(self, given: Example | None) -> Example | None:
        try:
            example = infer_example(self.model) if given is None else given
        except SourceError as error:
            self.skip(NUMERIC, f"no example to call the model with: {error.message}")
            return None
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return example.to(device)

    def _match_gradients(self, new: nn.Module, stock: nn.Module) -> None:
        """Let the copy's stock parameters require gradients where the baseline's do."""
        wanted = {name: p.requires_grad for name, p in named_parameters(stock)}
        frozen: list[str] = []
        for name, parameter in named_parameters(new, duplicates=False):
            if name in wanted and parameter.requires_grad != wanted[name]:
                frozen.append(name)
                parameter.requires_grad_(wanted[name])
        logged = {name for operation in self.record.operations for name in operation.frozen}
        foreign = [name for name in frozen if name not in logged]
        if foreign:
            detail = f"{len(foreign)} parameters differ and no edit says so"
            self.rows.append(Row("requires_grad", "info", where=foreign[0], detail=detail))
        if frozen:
            detail = f"{len(frozen)} stock parameters are frozen, and were unfrozen on the copy"
            self.rows.append(Row("frozen by the rewrite", "info", detail=detail))

    def _report(self, measured: Measured, shape: str) -> None:
        found = compare_runs(measured, self._bounds(), shape)
        self.rows.extend(found.rows)
        self.unchecked.extend(found.unchecked)

    def _bounds(self) -> Bounds:
        return Bounds(self.contract, drifted=self.drifted)

    def _other_shapes(self, new: nn.Module, stock: nn.Module, example: Example) -> None:
        """Measure at the other sizes that a call like this can have."""
        others = variants(example)
        if not others:
            self.skip("outputs at another shape", "the example has no batch dimension to change")
        for other in others:
            for training in (False, True):
                measured = measure(stock, new, other, training=training, gradients=False)
                self._report(measured, f"shape {_shape(example, other)}")

    def _flops(self, new: nn.Module, stock: nn.Module, example: Example) -> None:
        before, after = count_flops(stock, example), count_flops(new, example)
        if before is None or after is None:
            self.skip("FLOPs", "the forward cannot be counted")
            return
        change = f"{human_count(before)} before, {human_count(after)} after"
        self.rows.append(Row("FLOPs of a forward", "info", detail=change))

    def _insertions(self, example: Example, base: Measured) -> None:
        if not self.added:
            return
        probe = Probe(self.record, example, base.base)
        found = probe.look(self.model, self.fresh)
        self.rows.extend(found.rows)
        self.unchecked.extend(found.unchecked)

    def _on_meta(self) -> bool:
        tensors: Iterable[Tensor] = (*self.model.parameters(), *self.model.buffers())
        return any(tensor.device.type == "meta" for tensor in tensors)


def _without_masks(example: Example) -> Example:
    """A call without the arguments that are masks by their names."""
    kept = {name: value for name, value in example.kwargs.items() if not name.endswith("mask")}
    return Example(example.args, kept)


def _shape(example: Example, other: Example) -> str:
    """The shape of the first tensor that two calls have in different sizes."""
    pairs = zip(example.tensors(), other.tensors(), strict=True)
    return str(next((tuple(b.shape) for a, b in pairs if a.shape != b.shape), ()))
