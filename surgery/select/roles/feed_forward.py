"""The weights of feed-forward layers, gated or not, and of the routers of experts."""

from __future__ import annotations

from surgery.select.roles import reach
from surgery.select.roles.dataflow import Dataflow
from surgery.select.roles.findings import Findings, other_features
from surgery.select.roles.ops import (
    shape,
)
from surgery.select.roles.role import Features
from surgery.select.roles.values import (
    Attended,
    Joined,
    Product,
    Projection,
    Use,
    Value,
)


def feed_forward(flow: Dataflow, found: Findings) -> None:
    """Two pointwise weights with a nonlinearity between them, within a residual branch."""
    for out in flow.evidence.uses:
        if not out.pointwise:
            continue
        for part in _whole_inputs(out.data):
            if isinstance(part, Projection) and part.bent:
                _plain_unit(flow, found, flow.evidence.uses[part.use], out)
            elif isinstance(part, Product):
                _gated_unit(flow, found, part, out)


def _whole_inputs(data: Value) -> tuple[Value, ...]:
    """What a weight takes as a whole; of several tensors side by side, those beside an attention's.

    A weight that takes both closes a parallel block. Others that take several tensors (a Res2Net's,
    a Ghost module's) are no part of a feed-forward layer.
    """
    if not isinstance(data, Joined):
        return (data,)
    return data.parts if any(isinstance(part, Attended) for part in data.parts) else ()


def _is_unit(flow: Dataflow, wide: Use, out: Use) -> bool:
    return wide.pointwise and reach.joins_residual(flow, wide.data_node, out, straight=True)


def _plain_unit(flow: Dataflow, found: Findings, wide: Use, out: Use) -> None:
    if not _is_unit(flow, wide, out):
        return
    found.add(wide.site, "mlp.in", f"a nonlinearity leads from it to {out.site}")
    found.add(out.site, "mlp.out", f"a nonlinearity leads from {wide.site} to it")
    if found.has(wide.site, "attention") and found.slices.get(wide.site):
        taken = found.slices[wide.site]
        taken["in"] = other_features(taken.values(), shape(wide.node)[wide.axis])


def _gated_unit(flow: Dataflow, found: Findings, unit: Product, out: Use) -> None:
    gate, value = (flow.evidence.uses[p.use] for p in (unit.gate, unit.value))
    if not (_is_unit(flow, gate, out) and _is_unit(flow, value, out)):
        return
    found.add(out.site, "mlp.out", f"the gated unit of {gate.site} leads to it")
    if gate.site == value.site:
        found.add(
            gate.site, "mlp.gate_in", f"it makes both factors of the gated unit of {out.site}"
        )
        slices = _gate_slices(flow, unit, gate)
        found.slices.setdefault(gate.site, {}).update(slices)
        return
    if not unit.ordered:
        for use in (gate, value):
            found.unresolved[use.site] = "which factor of its unit is the gate cannot be told"
        return
    found.add(gate.site, "mlp.gate", f"a nonlinearity of it multiplies {value.site}")
    found.add(value.site, "mlp.in", f"it is multiplied by a nonlinearity of {gate.site}")


def _gate_slices(flow: Dataflow, unit: Product, use: Use) -> dict[str, Features]:
    if not unit.ordered:
        return {}
    indices = flow.indices(use.node, use.axis)
    if unit.gate_node is unit.value_node:
        whole = indices.features(unit.gate_node)
        if not isinstance(whole, tuple):
            return {}
        middle = (whole[0] + whole[1]) // 2
        return {"in": (whole[0], middle), "gate": (middle, whole[1])}
    gate, value = indices.features(unit.gate_node), indices.features(unit.value_node)
    return {} if gate is None or value is None else {"gate": gate, "in": value}


def routers(flow: Dataflow, found: Findings) -> None:
    """Weights whose largest outputs choose and weigh the outputs of experts."""
    for index in flow.evidence.routers:
        use = flow.evidence.uses[index]
        found.add(use.site, "router", "its largest outputs choose and weigh what experts return")
