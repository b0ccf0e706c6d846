"""Run the original and the rewritten model alike, and judge the difference by a contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.record import Contract
from surgery.sources import Example
from surgery.table import human_bytes
from surgery.verification.outputs import Deviation, compare, compare_tensors, not_finite
from surgery.verification.report import Result, Row, Unchecked
from surgery.verification.runs import Run, run

#: Relative to a gradient's largest element. A rewrite may reorder the sums in which a gradient is
#: accumulated, so gradients of an exact rewrite are equal up to rounding only.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Measured:
    """One call of both models.

    Attributes:
        base: The original.
        new: The rewritten model.
        training: Whether in train mode.
        unstable: How far two calls of the original are apart.
        unstable_gradients: Names of parameters whose gradients differ between them.
    """

    base: Run
    new: Run
    training: bool
    unstable: Deviation = field(default_factory=Deviation)
    unstable_gradients: frozenset[str] = frozenset()

    @property
    def mode(self) -> str:
        """The mode's name."""
        return "train" if self.training else "eval"


@dataclass(frozen=True)
class Bounds:
    """What is allowed.

    Attributes:
        contract: What the rewrites promise.
        drifted: Whether what was inserted was trained, so that they promise nothing.
    """

    contract: Contract
    drifted: bool

    @property
    def binding(self) -> bool:
        """Whether a deviation of the values is a broken promise."""
        return not self.drifted and self.contract.kind != "changes"

    def judge(self, deviation: Deviation) -> Result:
        """The result for a deviation whose excess was computed with this contract's bounds."""
        if deviation.equal:
            return "equal"
        if deviation.detail:
            return "broken"  # another structure, shape or dtype, which no contract allows
        if self.drifted:
            return "drift"
        if self.contract.kind == "changes":
            return "changed"
        return "within" if deviation.excess <= 1.0 else "broken"


@dataclass
class Findings:
    """Rows for the report, and what could not be checked."""

    rows: list[Row] = field(default_factory=list[Row])
    unchecked: list[Unchecked] = field(default_factory=list[Unchecked])


def measure(
    stock: nn.Module, new: nn.Module, example: Example, *, training: bool, gradients: bool
) -> Measured:
    """Call both models with the same seeds; the original again where they differ.

    Twice the same input shows whether the original agrees with itself.
    """
    base = run(stock, example, training=training, gradients=gradients)
    if base.error is not None:
        return Measured(base, Run(), training)
    rewritten = run(new, example, training=training, gradients=gradients)
    if _agree(base, rewritten):
        return Measured(base, rewritten, training)
    again = run(stock, example, training=training, gradients=gradients)
    unstable = compare(base.outputs, again.outputs, rtol=0.0, atol=0.0)
    shaky = frozenset(n for n, g in base.gradients.items() if not _same(g, again.gradients.get(n)))
    return Measured(base, rewritten, training, unstable, shaky)


def _agree(base: Run, new: Run) -> bool:
    outputs = compare(base.outputs, new.outputs, rtol=0.0, atol=0.0)
    return outputs.equal and all(_same(g, new.gradients.get(n)) for n, g in base.gradients.items())


def compare_runs(measured: Measured, bounds: Bounds, shape: str) -> Findings:
    """Judge outputs, buffers and gradients of one pair of calls."""
    found = Findings()
    what = f"{measured.mode}, {shape}"
    if measured.base.error is not None:
        reason = f"the original model raises {_named(measured.base.error)}"
        found.unchecked.append(Unchecked(f"outputs ({what})", reason))
        return found
    if measured.new.error is not None:
        detail = f"the rewritten model raises {_named(measured.new.error)}, the original does not"
        found.rows.append(Row(f"outputs ({what})", "broken", where="forward", detail=detail))
        return found
    _outputs(found, measured, bounds, what)
    _finite(found, measured, what)
    _buffers(found, measured, bounds, what)
    if measured.base.gradients:
        _gradients(found, measured, bounds, what)
        before, after = measured.base.saved_bytes, measured.new.saved_bytes
        kept = f"{human_bytes(before)} before, {human_bytes(after)} after"
        found.rows.append(Row(f"kept for backward ({what})", "info", detail=kept))
    return found


def _outputs(found: Findings, measured: Measured, bounds: Bounds, what: str) -> None:
    contract = bounds.contract
    deviation = compare(
        measured.base.outputs, measured.new.outputs, rtol=contract.rtol, atol=contract.atol
    )
    if not measured.unstable.equal and not deviation.equal and not deviation.detail:
        reason = (
            f"the original model is not deterministic: two calls differ by "
            f"{measured.unstable.worst:.3g} at {measured.unstable.where}"
        )
        found.unchecked.append(Unchecked(f"outputs ({what})", reason))
        return
    count = sum(isinstance(leaf, Tensor) for leaf in measured.base.outputs.values())
    detail = deviation.detail or f"{count} tensor{'' if count == 1 else 's'}"
    worst = None if deviation.detail else deviation.worst
    result = bounds.judge(deviation)
    found.rows.append(Row(f"outputs ({what})", result, worst, deviation.where, detail))


def _finite(found: Findings, measured: Measured, what: str) -> None:
    for path, leaf in measured.new.outputs.items():
        wrong = not_finite(leaf) if isinstance(leaf, Tensor) else None
        if wrong is None:
            continue
        count, first = wrong
        before = measured.base.outputs.get(path)
        of_old = not_finite(before) if isinstance(before, Tensor) else None
        result: Result = "broken" if of_old is None else "info"
        also = "" if of_old is None else f"; the original has {of_old[0]}"
        detail = f"{count} values are NaN or infinite{also}"
        found.rows.append(
            Row(f"finite outputs ({what})", result, where=path + first, detail=detail)
        )


def _buffers(found: Findings, measured: Measured, bounds: Bounds, what: str) -> None:
    """Running statistics and the like must come out of a call as they would have."""
    check = f"buffers after the call ({what})"
    new = measured.new.buffers
    shared = {name: value for name, value in measured.base.buffers.items() if name in new}
    contract = bounds.contract
    deviation = compare(
        shared, {name: new[name] for name in shared}, rtol=contract.rtol, atol=contract.atol
    )
    if not measured.unstable.equal and not deviation.equal:
        found.unchecked.append(Unchecked(check, "the original model is not deterministic"))
        return
    if shared:
        worst = None if deviation.detail else deviation.worst
        detail = deviation.detail or f"{len(shared)} buffer{'' if len(shared) == 1 else 's'}"
        found.rows.append(Row(check, bounds.judge(deviation), worst, deviation.where, detail))


def _gradients(found: Findings, measured: Measured, bounds: Bounds, what: str) -> None:
    check = f"gradients ({what})"
    base, new = measured.base.gradients, measured.new.gradients
    had = [name for name, gradient in base.items() if gradient is not None]
    lost = [name for name in had if _is_lost(base[name], new.get(name))]
    gained = [n for n, g in base.items() if g is None and new.get(n) is not None]
    if lost:
        detail = f"{len(lost)} of {len(had)} parameters lost their gradient"
        found.rows.append(Row(check, "broken", where=lost[0], detail=detail))
        return
    if gained:
        detail = f"{len(gained)} stock parameters have a gradient that had none"
        found.rows.append(Row(f"new {check}", "info", where=gained[0], detail=detail))
    judged = [name for name in had if name not in measured.unstable_gradients]
    if len(judged) < len(had):
        first = min(measured.unstable_gradients)
        reason = f"not deterministic in the original model, first {first}"
        found.unchecked.append(Unchecked(f"{check} of {len(had) - len(judged)} parameters", reason))
    deviation = _worst_gradient(base, new, judged, bounds.contract)
    detail = deviation.detail or f"{len(judged)} parameters"
    found.rows.append(Row(check, bounds.judge(deviation), deviation.worst, deviation.where, detail))


def _is_lost(base: Tensor | None, new: Tensor | None) -> bool:
    """Whether a gradient is gone: None, or all zero where it was not."""
    return new is None or (base is not None and bool(base.any()) and not bool(new.any()))


def _worst_gradient(
    base: Mapping[str, Tensor | None],
    new: Mapping[str, Tensor | None],
    names: list[str],
    contract: Contract,
) -> Deviation:
    found = Deviation()
    for name in names:
        old, now = base[name], new[name]
        if old is None or now is None:
            continue
        rtol = max(contract.rtol, _ROUNDING.get(old.dtype, 4e-2))
        scale = float(old.abs().max()) if old.numel() else 0.0
        bound = contract.atol + rtol * scale
        one = compare_tensors(name, old, now, rtol=0.0, atol=bound)
        if one.beyond(found):
            found = one
    return found


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return compare_tensors("", one, other, rtol=0.0, atol=0.0).equal


def _named(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
