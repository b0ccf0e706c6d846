"""Normalisations, tables that are looked up, and parameters that meet the states as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from surgery.capture.nodes import op_name, spec
from surgery.select.roles import reach
from surgery.select.roles.algebra import uses_in
from surgery.select.roles.dataflow import Dataflow
from surgery.select.roles.findings import Findings, SiteOf, steering
from surgery.select.roles.ops import ROOTS, STATISTICS, Kind, module_kind, op_kind, shape
from surgery.select.roles.values import (
    Fixed,
    Stream,
    Use,
    Value,
)
from surgery.select.sites import own_parameters

Shapes = Mapping[str, tuple[int, ...]]


def norms(
    graph: fx.Graph,
    flow: Dataflow,
    modules: Mapping[str, nn.Module],
    found: Findings,
    site_of: SiteOf,
) -> None:
    """Torch's normalisations, and layers of vectors that divide by the root of a statistic."""
    computed: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            if module_kind(modules[str(node.target)]) is Kind.NORMALISE:
                found.add(str(node.target), "norm", "it is one of torch's normalisations")
        elif node.op in ("call_function", "call_method"):
            names = computed.setdefault(str(node.meta.get("owner", "")), set())
            names.add("sqrt" if _is_root(node) else op_name(node))
            if op_kind(node) is Kind.NORMALISE:
                names.update(("mean", "sqrt"))
    for path, names in computed.items():
        written_out = names & STATISTICS and names & ROOTS
        if written_out and _only_vectors(modules[path]):
            found.add(path, "norm", "it divides by the root of a statistic of its input")
    for name in flow.evidence.norms:
        found.add(site_of(name), "norm", "a normalisation function is given it")


def _is_root(node: fx.Node) -> bool:
    powers = [argument for argument in node.args[1:] if isinstance(argument, float)]
    return op_name(node) == "pow" and bool(powers) and abs(powers[0]) == 0.5


def _only_vectors(module: nn.Module) -> bool:
    vectors = (sum(size > 1 for size in t.shape) < 2 for t in own_parameters(module).values())
    return all(vectors) and not module._modules  # pyright: ignore[reportPrivateUsage]


def tables(flow: Dataflow, found: Findings) -> None:
    """Tables that are looked up by row: tokens, classes, positions, types."""
    lookups = [use for use in flow.evidence.uses if use.kind == "table"]
    widest: dict[tuple[object, ...], int] = {}
    for use in lookups:
        widest[_together(use)] = max(widest.get(_together(use), 0), use.rows)
    for use in lookups:
        if use.index in flow.evidence.biases:
            found.add(use.site, "attention_bias", "its rows are added to attention scores")
            continue
        index = spec(use.data_node)
        if index is not None and index.dtype.is_floating_point:
            # A class of its own that reads positions off the shape of what it is given.
            found.add(use.site, "embed.position", "it is looked up by position")
            continue
        if not isinstance(use.data, Fixed):
            found.unresolved[use.site] = "it is looked up by what the model computes"
            continue
        given = use.data.source == "index"
        if given and len(shape(use.data_node)) < 2:
            found.add(use.site, "embed.class", "it is looked up by one index per example")
        elif given and use.rows == widest[_together(use)]:
            found.add(use.site, "embed.token", "it is looked up by the model's input")
        elif use.rows < shape(use.data_node)[-1]:
            found.add(use.site, "embed.type", "it has fewer rows than a sequence has positions")
        else:
            found.add(use.site, "embed.position", "it is looked up by position")


def _together(use: Use) -> tuple[object, ...]:
    """What lookups that are added up have in common."""
    return use.node.meta.get("owner"), shape(use.node)[-1:]


def score_terms(flow: Dataflow, found: Findings, site_of: SiteOf, shapes: Shapes) -> None:
    """What is added to attention scores, and what is applied to them."""
    evidence = flow.evidence
    for name in evidence.tables:
        if len(shapes[name]) > 1:
            found.add(site_of(name), "attention_bias", "it is added to attention scores")
    for use in (evidence.uses[index] for index in evidence.biases):
        if not found.has(use.site):
            found.add(use.site, "attention_bias", "what it makes is added to attention scores")
    _behind_biases(flow, found)
    for use in (evidence.uses[index] for index in evidence.mixers):
        found.add(use.site, "attention_scores", "it is applied to attention scores")


def bare_parameters(flow: Dataflow, found: Findings, site_of: SiteOf, shapes: Shapes) -> None:
    """Parameters that meet the states as they are, without a layer around them."""
    evidence = flow.evidence

    def note(name: str, role: str, reason: str) -> None:
        if not found.has(site_of(name)):
            found.add(site_of(name), role, reason)

    for name, values in evidence.positions.items():
        if any(_is_state(flow, found, value) for value in values):
            note(name, "embed.position", "it has a row for each position and is added")
    for name, uses in evidence.shifts.items():
        if uses & steering(flow) and len(shapes[name]) > 1:
            note(name, "modulation", "it is added to what modulates the states")
    for name in evidence.prefixes:
        note(name, "embed.learned", "it is put beside the sequence")
    for name, taker in _learned_inputs(flow):
        note(name, "embed.learned", f"{taker} takes it for its input")
    for name in evidence.scales:
        if len(shapes[name]) < 4:
            note(name, "scale", "it multiplies the states, feature by feature")


def _learned_inputs(flow: Dataflow) -> Iterator[tuple[str, str]]:
    """Parameters that a weight is applied to as they are, each with the site of the weight."""
    for use in flow.evidence.uses:
        if isinstance(use.data, Fixed) and use.data.source is None:
            yield from ((name, use.site) for name in use.data.parameters)


def _behind_biases(flow: Dataflow, found: Findings) -> None:
    """Weights that nothing but attention biases is computed from."""
    for use in reversed(flow.evidence.uses if flow.evidence.biases else []):
        if found.has(use.site) or not isinstance(use.data, Fixed):
            continue
        ahead = reach.ends_of(flow, use)
        sites = [flow.evidence.uses[index].site for index in ahead.uses]
        if (
            sites
            and not ahead.elsewhere
            and all(found.has(site, "attention_bias") for site in sites)
        ):
            found.add(use.site, "attention_bias", f"it reaches attention scores by {sites[0]}")


def _is_state(flow: Dataflow, found: Findings, value: Value) -> bool:
    """Whether a value belongs to the stream of states rather than to what steers it."""
    if isinstance(value, Stream):
        return True
    uses = uses_in(value)
    if not uses or uses & steering(flow):
        return False
    return not any(found.has(flow.evidence.uses[index].site, "attention") for index in uses)
