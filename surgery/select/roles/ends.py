"""Weights at the ends of a model: conditioning, inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from surgery.select.roles import reach
from surgery.select.roles.dataflow import Dataflow
from surgery.select.roles.findings import Findings, steering
from surgery.select.roles.values import (
    Fixed,
    Projection,
    Use,
)


def conditioning(flow: Dataflow, found: Findings) -> None:
    """Weights that scale or shift states alike at all positions, and the weights behind them."""
    steers = steering(flow)
    for use in reversed(flow.evidence.uses if steers else []):
        if found.has(use.site):
            continue
        ahead = reach.ends_of(flow, use)
        later = ahead.uses - {use.index}
        behind = (
            bool(later)
            and not ahead.elsewhere
            and all(
                found.has(flow.evidence.uses[index].site, "modulation", "conditioning")
                or index in steers
                for index in later
            )
        )
        if behind:
            found.add(use.site, "conditioning", "it reaches the states through modulation alone")
        elif use.index in steers:
            found.add(use.site, "modulation", "it scales or shifts the states at all positions")


def inputs(flow: Dataflow, found: Findings, modules: Mapping[str, nn.Module]) -> None:
    """Weights that take the model's input as it is."""
    for use in reversed(flow.evidence.uses):
        if found.has(use.site) or use.site in found.unresolved or use.kind == "table":
            continue
        raw = isinstance(use.data, Fixed) and use.data.source == "float"
        if use.kind == "conv":
            if raw and (_tiles(modules.get(use.site)) or reach.becomes_tokens(flow, use)):
                found.add(use.site, "embed.patch", "it turns patches of the input into states")
        elif raw or _continues_input(flow, use):
            ahead = reach.ends_of(flow, use).uses
            sites = [flow.evidence.uses[index].site for index in ahead]
            if any(found.has(site, "attention", "mlp", "embed") for site in sites):
                found.add(use.site, "embed.input", "it turns the input into states")


def _continues_input(flow: Dataflow, use: Use) -> bool:
    """Whether it is the second layer of a perceptron on the input."""
    if not isinstance(use.data, Projection) or not use.data.bent:
        return False
    before = flow.evidence.uses[use.data.use]
    return (
        before.kind == "linear"
        and isinstance(before.data, Fixed)
        and (before.data.source == "float")
    )


def _tiles(module: nn.Module | None) -> bool:
    """Whether a convolution's windows tile its input: as far apart as they are wide."""
    if not isinstance(module, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
        return False
    return module.kernel_size == module.stride and max(module.kernel_size) > 1


def heads(flow: Dataflow, found: Findings) -> None:
    """The last weight before an output of the model, unless it belongs to a residual branch."""
    for use in reversed(flow.evidence.uses):
        if found.has(use.site):
            continue
        ahead = reach.ends_of(flow, use)
        if ahead.leaves and not ahead.uses and not reach.joins_residual(flow, use.data_node, use):
            found.add(use.site, "head", "no weight comes between it and the model's output")
