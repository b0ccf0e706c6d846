"""The adapters of one weight, by name, and which of them count in a forward.

A bank is the child ``lowrank`` of the module whose weight it adapts, so that its tensors are
called ``q_proj.lowrank.<adapter>.lora_A`` and stock keys stay as they are. Modules that share a
weight share its bank. A module with several adapted parameters has one bank per parameter:
``experts.lowrank.<parameter>.<adapter>.lora_A``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from architectures.adapters import Adapter, Matrix
from surgery.errors import ModelStateError

#: Adapter names with the share each has in the change of the weight.
Mix = tuple[tuple[str, float], ...]

CHILD = "lowrank"

_numbers = itertools.count(1)


class Override(NamedTuple):
    """What counts for the calls of one context instead of what is active.

    Attributes:
        mix: The adapters with their shares.
        code: A number that differs from one mix to the next.
    """

    mix: Mix
    code: int

    @classmethod
    def of(cls, mix: Mix) -> Override:
        """The override for a mix."""
        return cls(mix, zlib.crc32(repr(mix).encode()) >> 1)


#: Whether the compiler sees a context variable that is read in a forward, and guards its value.
COMPILER_SEES_CONTEXT: bool = TorchVersion(torch.__version__) >= "2.15"

# Family number → override, for this context (thread or task). It is read in the forward itself,
# so that compiled code follows it as well.
overrides: ContextVar[Mapping[int, Override] | None] = ContextVar("surgery_adapters", default=None)


class Family:
    """What all banks of one model have in common. A copy of a model is another family."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = next(_numbers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return Family()

    def __reduce__(self) -> tuple[type[Family], tuple[()]]:
        return (Family, ())


class Bank(nn.Module):
    """The adapters of one weight. Hosts read it; it is never called.

    Args:
        matrix: How the weight is read as a matrix.
        family: Shared by all banks of a model.
        parameter: Name of the weight in the module that holds it.
        trained: Whether the weight required gradients when the bank was made.
        keep_base: Whether merging keeps a copy of the weight: only with ``memory``.

    Attributes:
        active: What counts in a forward, unless the context says otherwise.
        merged: What was added into the weight itself, possibly nothing; hosts add nothing while
            it is set.
        copied: Whether the edit log has a copy of the weight from before merging.
        originals: Adapter → SHA-256 of the weight from before the adapter changed it, where that is
            to be read again from the model's source.
        pending: Adapters without first values: they were put in on the meta device.
        gains: The factors per row that were merged in, one for each adapter of the sum, None for
            one that has none: without a copy they are needed to take the adapters out.
    """

    def __init__(
        self,
        matrix: Matrix,
        family: Family,
        *,
        parameter: str,
        trained: bool,
        keep_base: Literal["memory", "source", "none"],
    ) -> None:
        super().__init__()
        self.matrix = matrix
        self.family = family
        self.parameter = parameter
        self.trained = trained
        self.keep_base: Literal["memory", "source", "none"] = keep_base
        self.active: Mix = ()
        self.merged: Mix | None = None
        self.copied = False
        self.originals: dict[str, str] = {}
        self.pending: frozenset[str] = frozenset()
        self.gains: tuple[Tensor | None, ...] = ()

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name."""
        return cast("dict[str, Adapter]", self.__dict__["_modules"])

    def counting(self) -> list[tuple[Adapter, float]]:
        """The adapters that count in this call, each with its share.

        Raises:
            ModelStateError: the context asks for a mix while the adapters are merged.
        """
        override = self._override()
        if self.merged is not None:
            if override is not None:
                raise ModelStateError(
                    "adapters that are merged into the weights cannot be switched off or mixed",
                    hint="call surgery.adapters.unmerge(model) first",
                )
            return []
        chosen = self.active if override is None else override.mix
        return self.contributions(chosen)

    def contributions(self, mix: Mix) -> list[tuple[Adapter, float]]:
        """What a mix adds to the weight, each adapter with its share.

        An adapter that took its start out of the weight gives it back as far as it does not
        count, so that without any adapter the weight is the original one.
        """
        return contributions(self.adapters, mix)

    def seal(self, result: Tensor, source: Tensor) -> Tensor:
        """Make activation checkpointing notice if the context's mix is gone when it recomputes.

        Checkpointing runs a forward again during the backward, by which time ``using`` may have
        ended; the gradients would silently be those of another mix. A saved tensor whose shape
        encodes the mix makes the comparison of saved tensors fail instead.

        Args:
            result: What the forward returns; returned as it is unless a mix is in force.
            source: What the result was computed from.

        Raises:
            ModelStateError: the forward runs under re-entrant checkpointing, which compares
                nothing.
        """
        override = self._override()
        if override is None:
            return result
        if torch.is_grad_enabled():
            return cast("Tensor", _Witness.apply(result, override.code))
        if self.training and source.requires_grad:
            raise ModelStateError(
                "a mix of adapters for one call does not survive re-entrant checkpointing",
                hint="use_reentrant=False and call backward within the context, or choose the "
                "adapters with surgery.adapters.activate",
            )
        return result

    def _override(self) -> Override | None:
        if not COMPILER_SEES_CONTEXT and torch.compiler.is_compiling():
            return None  # an override then runs without the compiler: surgery.adapters.using
        context = overrides.get()
        return None if context is None else context.get(self.family.number)

    def extra_repr(self) -> str:
        """What is active and what is merged, for ``print(model)``."""
        state = f"active={dict(self.active)}"
        return state if self.merged is None else f"{state}, merged={dict(self.merged)}"


class Banks(nn.Module):
    """The banks of several parameters of one module, by the parameter's name."""


def contributions(adapters: dict[str, Adapter], mix: Mix) -> list[tuple[Adapter, float]]:
    """What a mix adds to a weight; see ``Bank.contributions``."""
    # An adapter may be taken out by another thread at any moment.
    found = [(adapters.get(name), share) for name, share in mix]
    counting = [(adapter, share) for adapter, share in found if adapter is not None]
    shares = dict(mix)
    # A copy of a dict is made at once; a list of its items is not, if memory is collected.
    for name, adapter in adapters.copy().items():
        missing = 1.0 - shares.get(name, 0.0)
        if adapter.beginning is not None and missing:
            counting.append((adapter.beginning, missing))
    return counting


def bank_of(module: nn.Module, parameter: str = "weight") -> Bank | None:
    """The bank of a module's parameter, or None."""
    child = module.__dict__["_modules"].get(CHILD)
    if isinstance(child, Banks):
        child = child.__dict__["_modules"].get(parameter)
    return cast("Bank | None", child)


class _Witness(torch.autograd.Function):
    """The identity, saving for its backward an empty tensor whose shape is ``code``."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(result.new_empty((0, code)))
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Reading it is what lets checkpointing compare.
        _ = ctx.saved_tensors
        return grads[0], None
