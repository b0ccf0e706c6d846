"""What the methods of adapters do around the steps of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from surgery import adapters
from surgery.passes.lowrank import LowRank
from surgery.record import record_of
from surgery.train.run import Job

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from surgery.train.config import RunConfig

C = TypeVar("C", bound="RunConfig")


class OfAdapters(Job[C]):
    """A job whose rules may put adapters into the model."""

    _penalised: bool = False

    def prepared(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Attach what the methods of adapters do around the optimizer's step."""
        if not _has_adapters(model):
            return
        adapters.prepare(model, optimizer)
        self._penalised = adapters.penalty(model).requires_grad

    def penalty(self, model: nn.Module) -> Tensor | None:
        """What the methods of adapters add to the loss (SORSA)."""
        return adapters.penalty(model) if self._penalised else None


def _has_adapters(model: nn.Module) -> bool:
    record = record_of(model)
    return record is not None and any(edit.pass_name == LowRank.name for edit in record.edits)
