"""The weights around attentions: queries, keys, values, outputs, and what makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from surgery.select.roles import reach
from surgery.select.roles.algebra import uses_in
from surgery.select.roles.dataflow import Dataflow
from surgery.select.roles.findings import Findings, other_features
from surgery.select.roles.ops import (
    shape,
)
from surgery.select.roles.role import Features
from surgery.select.roles.values import (
    Attended,
    Core,
    Fixed,
    Joined,
    Projection,
    Stream,
    Use,
    Value,
)

_PARTS = {
    frozenset("q"): "attention.q",
    frozenset("k"): "attention.k",
    frozenset("v"): "attention.v",
    frozenset("qk"): "attention.qk",
    frozenset("kv"): "attention.kv",
    frozenset("qkv"): "attention.qkv",
}
_WORDS = {"q": "query", "k": "key", "v": "value"}
_LATENT = "queries, keys or values are projected from what it makes"


def attention(flow: Dataflow, found: Findings) -> None:
    """The weights whose outputs meet in an attention as query, key and value."""
    letters: dict[str, dict[str, list[tuple[Use, fx.Node]]]] = {}
    homes: dict[str, str] = {}
    for core in flow.evidence.cores:
        taken = _operand_uses(flow, core)
        upstream = _upstream(flow, taken.values())
        for index in upstream:
            use = flow.evidence.uses[index]
            found.add(use.site, "attention.latent", _LATENT)
        if not core.ordered and len({frozenset(uses) for uses in taken.values()}) > 1:
            _unordered(flow, found, taken)
            continue
        operands = {"q": core.query, "k": core.key, "v": core.value}
        for letter, uses in taken.items():
            for index in sorted(uses - upstream):
                use = flow.evidence.uses[index]
                homes.setdefault(use.site, core.owner)
                by_letter = letters.setdefault(use.site, {})
                by_letter.setdefault(letter, []).append((use, operands[letter].node))
    for site, by_letter in letters.items():
        _name_projection(flow, found, site, by_letter, homes[site])
    for core in flow.evidence.cores:
        _relative_positions(flow, found, core)


def _operand_uses(flow: Dataflow, core: Core) -> dict[str, set[int]]:
    operands = {"q": core.query, "k": core.key, "v": core.value}
    return {letter: uses_in(operand.value) for letter, operand in operands.items()}


def _upstream(flow: Dataflow, taken: Iterable[set[int]]) -> set[int]:
    """Weights that other projections of the same attention take their input from."""
    uses = set[int]().union(*taken)
    sources = {index: uses_in(flow.evidence.uses[index].data) for index in uses}
    return {index for index in uses if any(index in s for o, s in sources.items() if o != index)}


def _unordered(flow: Dataflow, found: Findings, taken: Mapping[str, set[int]]) -> None:
    for index in set[int]().union(*taken.values()):
        site = flow.evidence.uses[index].site
        found.unresolved[site] = (
            "it takes part in an attention without softmax whose query, key and value cannot be "
            "told apart"
        )


def _name_projection(
    flow: Dataflow,
    found: Findings,
    site: str,
    by_letter: Mapping[str, list[tuple[Use, fx.Node]]],
    home: str,
) -> None:
    name = _PARTS.get(frozenset(by_letter))
    words = " and ".join(_WORDS[letter] for letter in by_letter)
    if name is None:
        found.unresolved[site] = f"its output is both {words} of attentions"
        return
    found.add(site, name, f"its output is the {words} of the attention in {home or 'the model'}")
    slices = _slices(flow, by_letter)
    if slices:
        found.slices[site] = slices


def _slices(
    flow: Dataflow, by_letter: Mapping[str, list[tuple[Use, fx.Node]]]
) -> dict[str, Features]:
    """Part → output features, where a projection makes several things or more than one."""
    fused: dict[str, Features] = {}
    gates = {use for core in _attended(flow) for use in core.gates}
    for letter, places in by_letter.items():
        use, node = places[0]
        if len(by_letter) == 1 and use.index not in gates and not _feeds_more(flow, use):
            return {}
        features = flow.indices(use.node, use.axis).features(node)
        rows = None if features is None else flow.rows(use, features)
        if rows is None:
            return {}
        fused[letter] = rows
    use, _ = next(iter(by_letter.values()))[0]
    if use.index in gates:
        fused["gate"] = other_features(fused.values(), shape(use.node)[use.axis])
    return fused


def _attended(flow: Dataflow) -> list[Attended]:
    parts: list[Value] = []
    for use in flow.evidence.uses:
        parts.extend(use.data.parts if isinstance(use.data, Joined) else (use.data,))
    return [part for part in parts if isinstance(part, Attended)]


def _feeds_more(flow: Dataflow, use: Use) -> bool:
    """Whether other weights take the projection's output directly."""
    return any(use.index in uses_in(other.data) for other in flow.evidence.uses)


def _relative_positions(flow: Dataflow, found: Findings, core: Core) -> None:
    """Weights that make scores from positions, beside those of queries with keys."""
    if core.scores is None:
        return
    main = next((term for term in core.scores.terms if not term.indirect), None)
    for term in core.scores.terms:
        if term is main:
            continue
        for index in uses_in(term.left.value) | uses_in(term.right.value):
            use = flow.evidence.uses[index]
            if not found.has(use.site):
                found.add(use.site, "attention.position", "it makes scores of relative positions")
            for name in use.data.parameters if isinstance(use.data, Fixed) else ():
                flow.evidence.positions.setdefault(name, []).append(Stream())


def latents(flow: Dataflow, found: Findings) -> None:
    """Weights that nothing but queries, keys or values are projected from, without a bend."""
    for use in reversed(flow.evidence.uses):
        if use.kind != "linear" or found.has(use.site):
            continue
        ahead = reach.ends_of(flow, use)
        takers = [flow.evidence.uses[index] for index in ahead.uses]
        direct = all(taker.data == Projection(use.index) for taker in takers)
        if takers and direct and not ahead.elsewhere and all(_projects(found, t) for t in takers):
            found.add(use.site, "attention.latent", _LATENT)


def _projects(found: Findings, use: Use) -> bool:
    return any(name in found.names.get(use.site, {}) for name in _PARTS.values())


def attention_out(flow: Dataflow, found: Findings) -> None:
    """The first weight that takes what an attention returns, and what gates it on the way."""
    for use in flow.evidence.uses:
        parts = use.data.parts if isinstance(use.data, Joined) else (use.data,)
        attended = [part for part in parts if isinstance(part, Attended)]
        if not attended or found.has(use.site, "attention"):
            continue
        core = flow.evidence.cores[min(attended[0].cores)]
        home = core.owner or "the model"
        found.add(use.site, "attention.out", f"it takes what the attention in {home} returns")
        for index in {gate for part in attended for gate in part.gates}:
            gate = flow.evidence.uses[index]
            if not found.has(gate.site):
                found.add(gate.site, "attention.gate", f"it gates the attention in {home}")
