"""From the dataflow of a model to the role of each of its layers.

Each function below is the definition of some roles, in the words of ``docs/selectors.md``. None
looks at the name of a class or of an attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from surgery.capture import trace_model
from surgery.select.roles import reach
from surgery.select.roles.dataflow import Dataflow, uses_in
from surgery.select.roles.ops import ROOTS, STATISTICS, Kind, module_kind, op_kind, op_name, shape
from surgery.select.roles.role import Features, Role
from surgery.select.roles.values import (
    Attended,
    Core,
    Fixed,
    Joined,
    Product,
    Projection,
    Stream,
    Use,
    Value,
)
from surgery.select.sites import is_layer, own_parameters
from surgery.sources.examples import Example

_PARTS = {
    frozenset("q"): "attention.q",
    frozenset("k"): "attention.k",
    frozenset("v"): "attention.v",
    frozenset("qk"): "attention.qk",
    frozenset("kv"): "attention.kv",
    frozenset("qkv"): "attention.qkv",
}
_WORDS = {"q": "query", "k": "key", "v": "value"}
_PLAIN_USE = "the forward reads it, but not in a way that a role is defined by"
_PARAMETRIZED = ".parametrizations."
_SiteOf = Callable[[str], str]


def resolve_roles(model: nn.Module, example: Example) -> Mapping[str, Role]:
    """The roles of all sites that the forward of ``example`` uses, by path.

    Args:
        model: The model, on any device.
        example: What to call it with.

    Raises:
        CaptureError: the model cannot be traced.
    """
    trace = trace_model(model, example.args, example.kwargs)
    modules = dict(model.named_modules())
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
    found = _Findings()
    _attention(flow, found)
    _attention_out(flow, found)
    _feed_forward(flow, found)
    _routers(flow, found)
    _norms(trace.graph, flow, modules, found, site_of)
    _tables(flow, found)
    _parameters(flow, found, site_of, parameters)
    _conditioning(flow, found)
    _inputs(flow, found, modules)
    _heads(trace.graph, flow, found)
    _rest(flow, found)
    for node in trace.graph.nodes:
        if node.op == "get_attr" and str(node.target) in parameters:
            found.unresolved.setdefault(site_of(str(node.target)), _PLAIN_USE)
    return found.roles()


@dataclass
class _Findings:
    """Roles by site: in the order found, which is the order of their strength."""

    names: dict[str, dict[str, str]] = field(default_factory=dict[str, "dict[str, str]"])
    slices: dict[str, dict[str, Features]] = field(default_factory=dict[str, "dict[str, Features]"])
    unresolved: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, site: str, name: str, reason: str) -> None:
        self.names.setdefault(site, {}).setdefault(name, reason)

    def has(self, site: str, *groups: str) -> bool:
        """Whether a site has a role, one of the given groups if any are given."""
        names = self.names.get(site, {})
        return any(not groups or name.partition(".")[0] in groups for name in names)

    def roles(self) -> dict[str, Role]:
        found = {site: Role(None, reason) for site, reason in self.unresolved.items()}
        for site, names in self.names.items():
            first, *also = names
            reason = "; ".join(names.values())
            slices = sorted(self.slices.get(site, {}).items(), key=lambda part: part[1][:1])
            found[site] = Role(first, reason, dict(slices), tuple(also))
        return found


# -- attention ---------------------------------------------------------------------------------


def _attention(flow: Dataflow, found: _Findings) -> None:
    """The weights whose outputs meet in an attention as query, key and value."""
    letters: dict[str, dict[str, list[tuple[Use, fx.Node]]]] = {}
    homes: dict[str, str] = {}
    for core in flow.evidence.cores:
        taken = _operand_uses(flow, core)
        upstream = _upstream(flow, taken.values())
        for index in upstream:
            use = flow.evidence.uses[index]
            found.add(use.site, "attention.latent", "queries, keys or values are projected from it")
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


def _unordered(flow: Dataflow, found: _Findings, taken: Mapping[str, set[int]]) -> None:
    for index in set[int]().union(*taken.values()):
        site = flow.evidence.uses[index].site
        found.unresolved[site] = (
            "it takes part in an attention without softmax whose query, key and value cannot be "
            "told apart"
        )


def _name_projection(
    flow: Dataflow,
    found: _Findings,
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
        if features is None:
            return {}
        fused[letter] = features
    use, _ = next(iter(by_letter.values()))[0]
    if use.index in gates:
        fused["gate"] = _others(fused.values(), shape(use.node)[use.axis])
    return fused


def _attended(flow: Dataflow) -> list[Attended]:
    parts: list[Value] = []
    for use in flow.evidence.uses:
        parts.extend(use.data.parts if isinstance(use.data, Joined) else (use.data,))
    return [part for part in parts if isinstance(part, Attended)]


def _feeds_more(flow: Dataflow, use: Use) -> bool:
    """Whether other weights take the projection's output directly."""
    return any(use.index in uses_in(other.data) for other in flow.evidence.uses)


def _others(taken: Iterable[Features], size: int) -> Features:
    """The features that none of ``taken`` has."""
    used = {i for part in taken for i in (range(*part) if isinstance(part, tuple) else part)}
    rest = [index for index in range(size) if index not in used]
    if rest and rest[-1] - rest[0] + 1 == len(rest):
        return rest[0], rest[-1] + 1
    return rest


def _relative_positions(flow: Dataflow, found: _Findings, core: Core) -> None:
    """Weights that make scores from positions, beside those of queries with keys."""
    if core.scores is None:
        return
    for term in core.scores.terms:
        for index in uses_in(term.left.value) | uses_in(term.right.value):
            use = flow.evidence.uses[index]
            if not found.has(use.site):
                found.add(use.site, "attention.position", "it makes scores of relative positions")
            for name in use.data.parameters if isinstance(use.data, Fixed) else ():
                flow.evidence.positions.setdefault(name, []).append(Stream())


def _attention_out(flow: Dataflow, found: _Findings) -> None:
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


# -- feed-forward ------------------------------------------------------------------------------


def _feed_forward(flow: Dataflow, found: _Findings) -> None:
    """Two pointwise weights with a nonlinearity between them, within a residual branch."""
    for out in flow.evidence.uses:
        if not out.pointwise:
            continue
        parts = out.data.parts if isinstance(out.data, Joined) else (out.data,)
        for part in parts:
            if isinstance(part, Projection) and part.bent:
                _plain_unit(flow, found, flow.evidence.uses[part.use], out)
            elif isinstance(part, Product):
                _gated_unit(flow, found, part, out)


def _is_unit(flow: Dataflow, wide: Use, out: Use) -> bool:
    return wide.pointwise and reach.joins_residual(flow, wide.data_node, out)


def _plain_unit(flow: Dataflow, found: _Findings, wide: Use, out: Use) -> None:
    if not _is_unit(flow, wide, out):
        return
    found.add(wide.site, "mlp.in", f"a nonlinearity leads from it to {out.site}")
    found.add(out.site, "mlp.out", f"a nonlinearity leads from {wide.site} to it")
    if found.has(wide.site, "attention") and found.slices.get(wide.site):
        taken = found.slices[wide.site]
        taken["in"] = _others(taken.values(), shape(wide.node)[wide.axis])


def _gated_unit(flow: Dataflow, found: _Findings, unit: Product, out: Use) -> None:
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


def _routers(flow: Dataflow, found: _Findings) -> None:
    """Weights whose largest outputs choose and weigh the outputs of experts."""
    for index in flow.evidence.routers:
        use = flow.evidence.uses[index]
        found.add(use.site, "router", "its largest outputs choose and weigh what experts return")


# -- norms, tables, bare parameters ------------------------------------------------------------


def _norms(
    graph: fx.Graph,
    flow: Dataflow,
    modules: Mapping[str, nn.Module],
    found: _Findings,
    site_of: _SiteOf,
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


def _tables(flow: Dataflow, found: _Findings) -> None:
    """Tables that are looked up by row: tokens, classes, positions, types."""
    lookups = [use for use in flow.evidence.uses if use.kind == "table"]
    widest: dict[tuple[object, ...], int] = {}
    for use in lookups:
        widest[_together(use)] = max(widest.get(_together(use), 0), use.rows)
    for use in lookups:
        if use.index in flow.evidence.biases:
            found.add(use.site, "attention_bias", "its rows are added to attention scores")
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
    return use.node.meta.get("owner"), shape(use.node)


def _parameters(
    flow: Dataflow, found: _Findings, site_of: _SiteOf, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Parameters that meet the states as they are, without a layer around them."""
    evidence = flow.evidence
    for name in evidence.tables:
        if len(shapes[name]) > 1:
            found.add(site_of(name), "attention_bias", "it is added to attention scores")
    for index in evidence.biases:
        use = evidence.uses[index]
        if not found.has(use.site):
            found.add(use.site, "attention_bias", "what it makes is added to attention scores")
    for index in evidence.mixers:
        use = evidence.uses[index]
        found.add(use.site, "attention_scores", "it is applied to attention scores")
    for name, values in evidence.positions.items():
        site = site_of(name)
        if found.has(site):
            continue
        if any(_is_state(flow, found, value) for value in values):
            found.add(site, "embed.position", "it has a row for each position and is added")
    for name, uses in evidence.shifts.items():
        if uses & _steering(flow) and len(shapes[name]) > 1 and not found.has(site_of(name)):
            found.add(site_of(name), "modulation", "it is added to what modulates the states")
    for name in evidence.prefixes:
        if not found.has(site_of(name)):
            found.add(site_of(name), "embed.learned", "it is put beside the sequence")
    for use in evidence.uses:
        learned = use.data.parameters if isinstance(use.data, Fixed) and not use.data.source else ()
        for name in learned:
            if not found.has(site_of(name)):
                found.add(site_of(name), "embed.learned", f"{use.site} takes it for its input")
    for name in evidence.scales:
        if not found.has(site_of(name)) and len(shapes[name]) < 4:
            found.add(site_of(name), "scale", "it multiplies the states, feature by feature")


def _is_state(flow: Dataflow, found: _Findings, value: Value) -> bool:
    """Whether a value belongs to the stream of states rather than to what steers it."""
    if isinstance(value, Stream):
        return True
    uses = uses_in(value)
    if not uses or uses & _steering(flow):
        return False
    return not any(found.has(flow.evidence.uses[index].site, "attention") for index in uses)


def _steering(flow: Dataflow) -> set[int]:
    """The uses of weights that scale or shift states."""
    return set[int]().union(*flow.evidence.modulators.values())


# -- conditioning, inputs, outputs -------------------------------------------------------------


def _conditioning(flow: Dataflow, found: _Findings) -> None:
    """Weights that scale or shift states alike at all positions, and the weights behind them."""
    steering = _steering(flow)
    for use in reversed(flow.evidence.uses if steering else []):
        if found.has(use.site):
            continue
        ahead, elsewhere = reach.next_uses(flow, use)
        later = ahead - {use.index}
        behind = (
            bool(later)
            and not elsewhere
            and all(
                found.has(flow.evidence.uses[index].site, "modulation", "conditioning")
                or index in steering
                for index in later
            )
        )
        if behind:
            found.add(use.site, "conditioning", "it reaches the states through modulation alone")
        elif use.index in steering:
            found.add(use.site, "modulation", "it scales or shifts the states at all positions")


def _inputs(flow: Dataflow, found: _Findings, modules: Mapping[str, nn.Module]) -> None:
    """Weights that take the model's input as it is."""
    for use in reversed(flow.evidence.uses):
        if found.has(use.site) or use.kind == "table":
            continue
        raw = isinstance(use.data, Fixed) and use.data.source == "float"
        if use.kind == "conv":
            if raw and (_tiles(modules.get(use.site)) or reach.becomes_tokens(flow, use)):
                found.add(use.site, "embed.patch", "it turns patches of the input into states")
        elif raw or _continues_input(flow, use):
            ahead, _ = reach.next_uses(flow, use)
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


def _heads(graph: fx.Graph, flow: Dataflow, found: _Findings) -> None:
    """The last weight before an output of the model."""
    for node in graph.nodes:
        if node.op != "output":
            continue
        for result in _results(node.args[0]):
            for index in uses_in(flow.value(result)):
                site = flow.evidence.uses[index].site
                if not found.has(site):
                    found.add(site, "head", "no weight comes between it and the model's output")


def _results(value: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda node: found.append(node))  # pyright: ignore[reportArgumentType]
    return [node for node in found if node.op != "output"]


def _rest(flow: Dataflow, found: _Findings) -> None:
    for use in flow.evidence.uses:
        if found.has(use.site):
            found.unresolved.pop(use.site, None)
        elif use.kind == "conv":
            found.add(use.site, "conv", "a convolution that plays no other role")
        else:
            found.unresolved.setdefault(use.site, _unknown(flow, use))


def _unknown(flow: Dataflow, use: Use) -> str:
    ahead, elsewhere = reach.next_uses(flow, use)
    sites = sorted({flow.evidence.uses[index].site for index in ahead})
    goes = ", ".join(sites[:3]) + (", ..." if len(sites) > 3 else "")
    where = f"its output goes to {goes}" if goes else "no weight takes its output"
    return f"{where}{' and elsewhere' if elsewhere and goes else ''}, which fits no definition"
