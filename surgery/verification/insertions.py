"""Whether what was inserted takes part: an insertion that is not connected is exact too."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.copies import sharing
from surgery.passes.base import in_force
from surgery.record import Record
from surgery.sources import Example
from surgery.verification.measure import Findings
from surgery.verification.outputs import compare
from surgery.verification.report import Row, Unchecked
from surgery.verification.runs import Run, run
from surgery.verification.structure import tensor_named

REACH = "inserted tensors reached by gradient"
CHANGE = "random insertions change the output"
_SCALE = 0.05


@dataclass(frozen=True)
class Probe:
    """Randomises what was inserted, on a copy, and looks for its effect.

    Attributes:
        record: The edit log.
        example: The call, in eval mode.
        base: What that call gave on the original model.
    """

    record: Record
    example: Example
    base: Run

    def look(self, model: nn.Module, fresh: nn.Module | None) -> Findings:
        """Report which inserted tensors get a gradient, and whether they change the output.

        Args:
            model: The rewritten model.
            fresh: A copy with the same edits made anew, to tell an insertion that was switched
                off or merged from one that was never connected.
        """
        found = Findings()
        if self.base.error is not None:
            reason = "the original model cannot be called with the example"
            found.unchecked.append(Unchecked(REACH, reason))
            return found
        names = list(self.record.added)
        made = [name for name in names if isinstance(tensor_named(model, name), nn.Parameter)]
        trained = self._without_replaced(found, made, model)
        result = self._randomised(model, trained)
        if result.error is not None:
            reason = f"with random values in them the model raises {result.error!r}"
            found.unchecked.append(Unchecked(REACH, reason))
            return found
        self._report_buffers(found, len(names) - len(made))
        unreached = _unreached(result, trained)
        reached = len(trained) - len(unreached)
        unreached = self._without_idle(found, unreached, result)
        loose = unreached
        if unreached and fresh is not None:
            afresh = _unreached(self._randomised(fresh, trained), trained)
            loose = self._explain(found, unreached, afresh)
        self._report_reach(found, len(trained), reached, loose)
        if reached or loose:
            self._report_change(found, result)
        else:
            found.unchecked.append(Unchecked(CHANGE, "nothing inserted is reached at the moment"))
        return found

    def _randomised(self, model: nn.Module, names: Sequence[str]) -> Run:
        """Call a copy with random values in the named tensors, for their gradients alone."""
        copied = sharing(model, owned=names)
        for parameter in copied.parameters():
            parameter.requires_grad_(False)
        for name in names:
            tensor = tensor_named(copied, name)
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                _randomise(name, tensor)
                tensor.requires_grad_(True)
        return run(copied, self.example, training=False, gradients=True)

    def _without_replaced(self, found: Findings, names: list[str], model: nn.Module) -> list[str]:
        """Set aside what a later edit put constants in the place of."""
        told = {name for made, edit, _ in in_force(self.record) for name in made.idles(model, edit)}
        idle = [name for name in names if name in told]
        if idle:
            more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
            reason = "a later rewrite put constants in its place"
            found.unchecked.append(Unchecked(REACH, f"{idle[0]}{more}: {reason}"))
        return [name for name in names if name not in idle]

    def _without_idle(self, found: Findings, names: list[str], result: Run) -> list[str]:
        """Set aside what is connected, and may get a gradient of zero all the same."""
        idle = {
            name
            for made, edit, _ in in_force(self.record)
            if made.may_idle(edit)
            for name in edit.adds
        }
        off = [n for n in names if n in idle and result.gradients.get(n) is not None]
        if off:
            more = f" and {len(off) - 1} more" if len(off) > 1 else ""
            reason = "connected, but it scales zeros, or a ReLU is off with these random values"
            found.unchecked.append(Unchecked(REACH, f"{off[0]}{more}: {reason}"))
        return [name for name in names if name not in off]

    def _report_buffers(self, found: Findings, count: int) -> None:
        if count:
            reason = f"{count} inserted buffers take no gradient"
            found.unchecked.append(Unchecked(REACH, reason))

    def _explain(self, found: Findings, unreached: list[str], afresh: list[str]) -> list[str]:
        """Set aside what is reached when applied anew, or where no gradient comes anyway.

        Returns:
            The rest: what is not connected.
        """
        off = [name for name in unreached if name not in afresh]
        rest = [name for name in unreached if name in afresh]
        asleep = [name for name in rest if not self._site_is_reached(name)]
        reasons = {
            "switched off or merged at the moment; it is reached when applied anew": off,
            self._why_asleep(): asleep,
        }
        for reason, names in reasons.items():
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                found.unchecked.append(Unchecked(REACH, f"{names[0]}{more}: {reason}"))
        return [name for name in rest if name not in asleep]

    def _why_asleep(self) -> str:
        if not self.base.gradients:
            return "no gradient reaches it, nor perhaps its site: gradients=False"
        return "no gradient reaches its site in the original model either"

    def _site_is_reached(self, name: str) -> bool:
        """Whether what the edit works on got a gradient in the original model.

        A zero gate, as many networks start with, lets no gradient reach either.
        """
        edit = next(edit for edit in self.record.edits if name in edit.adds)
        gradients = self.base.gradients
        own = [n for n in gradients if n == edit.site or n.rpartition(".")[0] == edit.site]
        used = [n for n in edit.uses if n in gradients] or own
        if not gradients:
            return False  # unknown
        return not used or any(_is_nonzero(gradients[n]) for n in used)

    def _report_reach(self, found: Findings, total: int, reached: int, loose: list[str]) -> None:
        if loose:
            detail = f"{len(loose)} of {total} take no part in the forward"
            found.rows.append(Row(REACH, "broken", where=loose[0], detail=detail))
        elif reached:
            found.rows.append(Row(REACH, "ok", detail=f"{reached} of {total}"))

    def _report_change(self, found: Findings, result: Run) -> None:
        deviation = compare(self.base.outputs, result.outputs, rtol=0.0, atol=0.0)
        if deviation.equal:
            detail = "the output is that of the original model whatever they hold"
            found.rows.append(Row(CHANGE, "broken", where="output", detail=detail))
        else:
            found.rows.append(Row(CHANGE, "ok", deviation.worst, deviation.where))


def _unreached(result: Run, names: Sequence[str]) -> list[str]:
    return [name for name in names if not _is_nonzero(result.gradients.get(name))]


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


@torch.no_grad()
def _randomise(name: str, tensor: Tensor) -> None:
    """Add noise seeded by the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator) * _SCALE
    tensor.add_(noise.to(tensor.device, tensor.dtype))
