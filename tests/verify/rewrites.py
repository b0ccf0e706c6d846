"""Small passes for tests of verify, save and restore: some keep their promise, some do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from surgery.capture.graft import graft, ungraft
from surgery.passes.base import ApplyContext, Pass, PlanContext
from surgery.record import Contract, ContractKind, Edit, TensorSpec
from surgery.registry import PASSES
from surgery.select import Match, Site

_OPTIONS = ConfigDict(extra="forbid")


class Shifted:
    """``W x + b + shift``: exact while ``shift`` is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class Louder:
    """Changes the output by a thousandth."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class LouderWhileTraining:
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 1.001 if self.training else y


class LouderInLargerBatches:
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 1.001 if x.shape[0] > 2 else y


class Detached:
    """The same output, but the layer's weight gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        return nn.functional.linear(x, weight.detach(), bias)


class Poisoned:
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.where(y == y.max(), torch.nan, y)


class Failing:
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("this layer cannot run any more")


class Forgetful:
    """Resets a counter that the stock layer keeps."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.calls.zero_()
        return y


class Doubtful:
    """Carries its tensor and never reads it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


MIXINS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Shifted,
        Louder,
        LouderWhileTraining,
        LouderInLargerBatches,
        Detached,
        Poisoned,
        Failing,
        Forgetful,
        Doubtful,
    )
}


@dataclass(frozen=True, config=_OPTIONS)
class Graft(Pass):
    """Promises what it is told to promise, and grafts a mixin of this file on linear layers."""

    name: ClassVar[str] = "graft"

    mixin: str = "Shifted"
    adds: str | None = "shift"
    promise: ContractKind = "exact"
    atol: float = 0.0
    suffix: str = ""

    def accepts(self, site: Site) -> Match:
        if site.parameter is None and isinstance(site.module, nn.Linear):
            return Match.yes("a linear layer")
        return Match.no("not a linear layer")

    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        return [self._edit(site, context.rule) for site in sites]

    def _edit(self, site: Site, rule: str) -> Edit:
        weight = cast("Any", site.module).weight
        spec = TensorSpec((weight.shape[0],), str(weight.dtype).removeprefix("torch."))
        return Edit(
            rule=rule,
            pass_name=self.name,
            site=site.path,
            summary=f"graft {self.mixin}",
            adds={} if self.adds is None else {f"{site.path}.{self.adds}": spec},
            uses={f"{site.path}.{self.mixin}": "replace"},
            contract=Contract(self.promise, atol=self.atol),
        )

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        layer: Any = context.module(model, edit.site)
        graft(layer, MIXINS[self.mixin])
        if self.adds is not None:
            shift = torch.zeros_like(layer.weight[:, 0])
            layer.register_parameter(self.adds, nn.Parameter(shift))

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        layer: Any = context.module(model, edit.site)
        ungraft(layer, MIXINS[self.mixin])
        if self.adds is not None:
            delattr(layer, self.adds)


@dataclass(frozen=True, config=_OPTIONS)
class Rename(Graft):
    """Renames the weight, which no rewrite may."""

    name: ClassVar[str] = "rename"

    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        return [
            Edit(context.rule, self.name, site.path, "rename", {}, {}, Contract("exact"))
            for site in sites
        ]

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        layer: Any = context.module(model, edit.site)
        graft(layer, Renamed)
        weight = layer._parameters.pop("weight")
        layer._parameters = {"renamed": weight, **layer._parameters}

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        layer: Any = context.module(model, edit.site)
        ungraft(layer, Renamed)
        weight = layer._parameters.pop("renamed")
        layer._parameters = {"weight": weight, **layer._parameters}


class Renamed:
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.renamed, self.bias)


@dataclass(frozen=True, config=_OPTIONS)
class Round(Graft):
    """Rounds the weight to eight bits of mantissa and keeps a copy of what it was."""

    name: ClassVar[str] = "round"

    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        return [
            Edit(
                context.rule,
                self.name,
                site.path,
                "round",
                {},
                {f"{site.path}.weight": "replace"},
                Contract("close", rtol=0.05, atol=0.05),
            )
            for site in sites
        ]

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        layer: Any = context.module(model, edit.site)
        weight = layer.weight.detach()
        context.kept[f"{edit.site}.weight"] = weight.clone()
        weight.copy_(weight.bfloat16())

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        layer: Any = context.module(model, edit.site)
        layer.weight.detach().copy_(context.kept[f"{edit.site}.weight"])


@dataclass(frozen=True, config=_OPTIONS)
class Vandal(Graft):
    """Writes, when it is undone, to a weight that its edits do not name."""

    name: ClassVar[str] = "vandal"

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        super().revert(model, edit, context)
        with torch.no_grad():
            model.get_parameter("second.weight").zero_()


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the passes of this file known for the length of a test."""
    for cls in (Graft, Rename, Round, Vandal):
        monkeypatch.setitem(PASSES._builtin, cls.name, f"{__name__}:{cls.__name__}")
        monkeypatch.setitem(PASSES._loaded, cls.name, cls)
