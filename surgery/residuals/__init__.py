"""Residual additions of a captured graph: what is added to what, where, and in which order.

``find_residuals(graph, root)`` works on any graph of `surgery.capture`: of a whole model
(`trace_model`) or of one module with its children as leaves (`capture`). ``examine`` also says why
each other addition is none. ``place`` finds the layer a residual lies in, and
``residual_stacks`` groups them into runs whose state keeps its shape. ``surgery.inspect(model)``
lists what they find.

A residual addition
===================
Terms are added of which one, the **shortcut**, is what another, the **branch**, was computed
from. Between the two lies work: a weight layer, attention, or pooling. On its way to the addition
the shortcut may only be cast, rearranged, dropped out, scaled by a constant or a parameter, pooled,
or projected by one weight layer with its normalisation. A **projection** must in addition lie
within the forward that adds, beside a branch of more weight layers and a nonlinearity: otherwise
two branches are added, or two linear maps.

The addition must lie on the **main stream** of the smallest module call that contains its branch:
from one of the results of that call one gets to it by going back along shortcuts alone, and past
everything else through single tensors that all of the result depends on. That is what tells
``x + attention(x)`` from ``y + D * u`` inside a Mamba mixer, whose gate goes around it.
"""

from __future__ import annotations

from surgery.residuals.detect import Findings, NoResidual, examine, find_residuals
from surgery.residuals.places import ResidualStack, place, residual_stacks
from surgery.residuals.residual import Kind, Residual

__all__ = [
    "Findings",
    "Kind",
    "NoResidual",
    "Residual",
    "ResidualStack",
    "examine",
    "find_residuals",
    "place",
    "residual_stacks",
]
