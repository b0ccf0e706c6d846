"""From the dataflow of a model to the role of each of its layers.

The finders are called in the order of their strength: a site's first role is the one it is best
known by. None looks at the name of a class or of an attribute.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from surgery.capture import Trace
from surgery.select.roles import attention, ends, feed_forward, reach, tables
from surgery.select.roles.dataflow import Dataflow
from surgery.select.roles.findings import Findings
from surgery.select.roles.role import Role
from surgery.select.roles.values import Use
from surgery.select.sites import is_layer, walk
from surgery.table import some

_PLAIN_USE = "the forward reads it, but not in a way that a role is defined by"
_PARAMETRIZED = ".parametrizations."


def resolve_roles(model: nn.Module, trace: Trace) -> Mapping[str, Role]:
    """The roles of all sites that the traced forward uses, by path.

    Args:
        model: The model, on any device.
        trace: Its trace.
    """
    modules: dict[str, nn.Module] = dict(walk(model))
    parameters = {
        name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)
    }

    def site_of(parameter: str) -> str:
        path, mark, rest = parameter.partition(_PARAMETRIZED)
        if mark:
            name = rest.partition(".")[0]
        else:
            path, _, name = parameter.rpartition(".")
        whole = is_layer(modules[path])
        return path if whole else f"{path}.{name}" if path else name

    flow = Dataflow(trace.graph, modules, parameters, site_of)
    found = Findings()
    attention.attention(flow, found)
    attention.attention_out(flow, found)
    feed_forward.feed_forward(flow, found)
    feed_forward.routers(flow, found)
    tables.norms(trace.graph, flow, modules, found, site_of)
    tables.tables(flow, found)
    tables.score_terms(flow, found, site_of, parameters)
    tables.bare_parameters(flow, found, site_of, parameters)
    ends.conditioning(flow, found)
    ends.inputs(flow, found, modules)
    attention.latents(flow, found)
    ends.heads(flow, found)
    _rest(flow, found)
    for node in trace.graph.nodes:
        if node.op == "get_attr" and str(node.target) in parameters:
            found.unresolved.setdefault(site_of(str(node.target)), _PLAIN_USE)
    return found.roles()


def _rest(flow: Dataflow, found: Findings) -> None:
    for use in flow.evidence.uses:
        if found.has(use.site):
            found.unresolved.pop(use.site, None)
        elif use.kind == "conv":
            found.add(use.site, "conv", "a convolution that plays no other role")
        else:
            found.unresolved.setdefault(use.site, _unknown(flow, use))


def _unknown(flow: Dataflow, use: Use) -> str:
    ahead = reach.ends_of(flow, use).uses
    sites = list(dict.fromkeys(flow.evidence.uses[index].site for index in sorted(ahead)))
    if not sites:
        return "no role's definition fits it; no other weight takes its output"
    return f"no role's definition fits it; its output goes to {some(sites, 2)}"
