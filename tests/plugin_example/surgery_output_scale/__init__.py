"""A pass from another package: a learned scale on the outputs of linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from surgery.capture.graft import graft, ungraft
from surgery.passes.base import ApplyContext, Pass, PlanContext
from surgery.record import Contract, Edit, TensorSpec
from surgery.select import Match, Site


class Scaled:
    """What is grafted over the layer's class: its own forward, then the scale."""

    output_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., in) to (..., out)."""
        return super().forward(x) * self.output_scale


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OutputScale(Pass):
    """Contract ``exact`` while ``init`` is 1, else ``changes``.

    Multiplies every output feature of a linear layer by a learned number, as (IA)³ does
    (arXiv 2205.05638).

    Args:
        init: Value every scale starts from.
    """

    name: ClassVar[str] = "output-scale"

    init: float = 1.0

    def accepts(self, site: Site) -> Match:
        if site.parameter is None and isinstance(site.module, nn.Linear):
            return Match.yes("a linear layer")
        return Match.no(f"{type(site.module).__name__} is not a linear layer")

    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        return [self._edit(site, context.rule) for site in sites]

    def _edit(self, site: Site, rule: str) -> Edit:
        weight: Any = site.module.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        return Edit(
            rule=rule,
            pass_name=self.name,
            site=site.path,
            summary=f"scale {weight.shape[0]} outputs",
            adds={f"{site.path}.output_scale": TensorSpec((weight.shape[0],), dtype)},
            uses={f"{site.path}.output": "replace"},
            contract=Contract("exact" if self.init == 1.0 else "changes"),
        )

    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        layer: Any = context.module(model, edit.site)
        graft(layer, Scaled)
        scale = torch.full_like(layer.weight[:, 0], self.init)
        layer.register_parameter("output_scale", nn.Parameter(scale))

    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        layer: Any = context.module(model, edit.site)
        ungraft(layer, Scaled)
        del layer.output_scale
