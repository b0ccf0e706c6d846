"""What every tensor of a trace was made of, in one pass from the inputs to the outputs.

Each node gets a ``Value`` (see ``values.py``). On the way the facts that roles rest on are noted:
every use of a weight with what it was applied to, every attention with its query, key and value,
and what was added to or multiplied with what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from torch import fx, nn

from surgery.select.roles.features import Indices, varies_along
from surgery.select.roles.ops import (
    Kind,
    argument,
    holds_tensor,
    module_kind,
    op_kind,
    op_name,
    operands,
    shape,
    spec,
)
from surgery.select.roles.values import (
    STREAM,
    Attended,
    Core,
    Fixed,
    Joined,
    Operand,
    Product,
    Projection,
    Routed,
    Scores,
    Stream,
    Term,
    Use,
    Value,
)

_WRITTEN = "written_by"


@dataclass
class Evidence:
    """What was seen on the way.

    Attributes:
        uses: Every application of a weight.
        cores: Every attention.
        additions: Nodes that add two tensors computed by layers: where residuals are.
        modulators: Node → uses of weights that scale or shift another tensor there, one value
            for all its positions.
        routers: Uses of weights whose choice weighs the outputs of others.
        positions: Parameter → value it was added to, one entry for each position.
        shifts: Parameter → uses of weights whose output it was added to.
        prefixes: Parameters that were put beside a sequence of states.
        scales: Parameters that multiplied a tensor computed by layers, feature by feature.
        tables: Parameters added to attention scores.
        biases: Uses of weights added to attention scores.
        mixers: Uses of weights applied to attention scores.
        norms: Parameters that a torch normalisation function was given.
    """

    uses: list[Use] = field(default_factory=list[Use])
    cores: list[Core] = field(default_factory=list[Core])
    additions: list[fx.Node] = field(default_factory=list[fx.Node])
    modulators: dict[fx.Node, set[int]] = field(default_factory=dict[fx.Node, "set[int]"])
    routers: set[int] = field(default_factory=set[int])
    positions: dict[str, list[Value]] = field(default_factory=dict[str, "list[Value]"])
    shifts: dict[str, set[int]] = field(default_factory=dict[str, "set[int]"])
    prefixes: set[str] = field(default_factory=set[str])
    scales: set[str] = field(default_factory=set[str])
    tables: set[str] = field(default_factory=set[str])
    biases: set[int] = field(default_factory=set[int])
    mixers: set[int] = field(default_factory=set[int])
    norms: set[str] = field(default_factory=set[str])


class Dataflow:
    """The values of a trace's nodes and the evidence they give.

    Args:
        graph: From ``surgery.capture.trace_model``.
        modules: Path → module, of the traced model.
        parameters: Name → shape of every parameter.
        site_of: The site that a parameter belongs to.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, tuple[int, ...]],
        site_of: Callable[[str], str],
    ) -> None:
        self.evidence = Evidence()
        self._modules = modules
        self._parameters = parameters
        self._site_of = site_of
        self._values: dict[fx.Node, Value] = {}
        self._inputs: dict[fx.Node, int] = {}
        self._fresh: dict[fx.Node, int] = {}
        self._placeholders = 0
        self.order: dict[fx.Node, int] = {}
        for at, node in enumerate(graph.nodes):
            self.order[node] = at
            if node.op != "output" and holds_tensor(node.meta.get("val")):
                self._inputs[node] = self._reach(node)
                self._values[node] = self._visit(node)

    def value(self, node: fx.Node) -> Value:
        """What a node's tensor was made of."""
        return self._values[node]

    def inputs(self, node: fx.Node) -> int:
        """The inputs of the model that a node depends on, as a bit set."""
        return self._inputs.get(node, 0)

    def indices(self, source: fx.Node, axis: int) -> Indices:
        """The indices along an axis of a node's tensor, to be looked up at later nodes."""
        return Indices(source, axis, self._order_of, self._is_opaque)

    def _order_of(self, node: fx.Node) -> int:
        return self.order[node]

    def _is_opaque(self, node: fx.Node) -> bool:
        """Whether a node applies a weight whose output is not its input rearranged."""
        return node in self._fresh

    @property
    def fresh(self) -> Mapping[fx.Node, int]:
        """Node that applies a weight → the use, where what it made counts as that weight's."""
        return self._fresh

    # -- one node ------------------------------------------------------------------------------

    def _reach(self, node: fx.Node) -> int:
        if node.op == "placeholder":
            self._placeholders += 1
            return 1 << self._placeholders
        reach = 0
        for each in operands(node):
            reach |= self._inputs[each]
            for written in self._writes(each, node):
                reach |= self._inputs.get(written, 0)
        return reach

    def _visit(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            found = spec(node)
            floating = found is not None and found.dtype.is_floating_point
            return Fixed(source="float" if floating else "index")
        if node.op == "get_attr":
            name = str(node.target)
            return Fixed((name,) if name in self._parameters else ())
        if node.op == "call_module":
            return self._module(node)
        return _HANDLERS[op_kind(node)](self, node)

    def _read(self, node: fx.Node, reader: fx.Node) -> Value:
        """The value of an operand, with what was written into its memory before it is read."""
        written = [self._values[w] for w in self._writes(node, reader) if w in self._values]
        return self._values[node] if not written else _join([self._values[node], *written])

    def _writes(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        writes = cast("Iterable[fx.Node]", node.meta.get(_WRITTEN, ()))
        before, after = self.order[reader], self.order[node]
        return [w for w in writes if w in self.order and after < self.order[w] < before]

    def _operands(self, node: fx.Node) -> list[Operand]:
        return [Operand(self._read(each, node), each) for each in operands(node)]

    def _module(self, node: fx.Node) -> Value:
        path = str(node.target)
        module = self._modules[path]
        kind = module_kind(module)
        data = self._operands(node)
        if kind is Kind.CONVOLVE:
            pointwise = set(module.kernel_size) == {1} and set(module.stride) == {1}
            grouped = module.groups != 1
            axis = len(shape(node)) - len(cast("tuple[int, ...]", module.kernel_size)) - 1
            return self._apply(
                node, path, data[0], "conv", pointwise and not grouped, axis, grouped
            )
        if kind is Kind.LINEAR:
            return self._apply(node, path, data[0], "linear", True)
        if kind is Kind.LOOKUP:
            return self._look_up(node, path, data[0], int(module.num_embeddings))
        return _bend(data[0].value) if kind is Kind.BEND else self._same(data)

    def _apply(
        self,
        node: fx.Node,
        site: str,
        data: Operand,
        kind: str,
        pointwise: bool,
        axis: int = -1,
        grouped: bool = False,
    ) -> Value:
        use = Use(
            len(self.evidence.uses),
            node,
            site,
            kind,
            data.value,
            data.node,
            pointwise,
            axis % max(1, len(shape(node))),
        )
        self.evidence.uses.append(use)
        if isinstance(data.value, Scores):
            return replace(data.value, mixers=data.value.mixers | {use.index})
        if grouped and isinstance(data.value, Projection) and not data.value.bent:
            return data.value  # mixes positions, not features: the projection goes through
        self._fresh[node] = use.index
        return Projection(use.index)

    def _normalise(self, node: fx.Node) -> Value:
        data = self._operands(node)
        for given in data[1:]:
            if isinstance(given.value, Fixed):
                self.evidence.norms.update(given.value.parameters)
        return self._same(data[:1])

    def _pass(self, node: fx.Node) -> Value:
        return self._same(self._operands(node))

    def _same(self, data: list[Operand]) -> Value:
        """What came out is a function of what went in: of one thing, or of a mixture."""
        return _merge([operand.value for operand in data])

    # -- views and joins -----------------------------------------------------------------------

    def _view(self, node: fx.Node) -> Value:
        data = self._operands(node)
        if not data:
            return Fixed()
        value = data[0].value
        chosen = [d.value for d in data[1:] if isinstance(d.value, Routed)]
        if chosen and isinstance(value, Projection) and value.use == chosen[0].use:
            return chosen[0]
        indexed = [d for d in data[1:] if isinstance(d.value, Fixed) and d.value.source == "index"]
        if indexed and op_name(node) in ("getitem", "index_select") and self._is_table(value):
            return self._lookup_in(node, cast("Fixed", value), indexed[0])
        return value

    def _is_table(self, value: Value) -> bool:
        if not isinstance(value, Fixed) or len(value.parameters) != 1 or value.source is not None:
            return False
        return len(self._parameters[value.parameters[0]]) == 2

    def _lookup_in(self, node: fx.Node, table: Fixed, index: Operand) -> Value:
        name = table.parameters[0]
        return self._look_up(node, self._site_of(name), index, self._parameters[name][0])

    def _look_up(self, node: fx.Node, site: str, index: Operand, rows: int) -> Value:
        made = self._apply(node, site, index, "table", False)
        self.evidence.uses[-1] = replace(self.evidence.uses[-1], rows=rows)
        return made

    def _join_op(self, node: fx.Node) -> Value:
        data = self._operands(node)
        values = [d.value for d in data]
        if op_name(node) in ("cat", "concat", "concatenate"):
            self._note_prefixes(values)
        return _join(values)

    def _note_prefixes(self, values: list[Value]) -> None:
        states = [v for v in values if isinstance(v, Projection | Stream | Joined)]
        if not states:
            return
        for value in values:
            if isinstance(value, Fixed) and value.source is None:
                self.evidence.prefixes.update(value.parameters)

    def _gather(self, node: fx.Node) -> Value:
        data = self._operands(node)
        value = data[0].value
        chosen = data[-1].value
        if isinstance(chosen, Routed) and isinstance(value, Projection) and value.use == chosen.use:
            return chosen
        if isinstance(value, Scores):
            return replace(value, terms=tuple(replace(t, indirect=True) for t in value.terms))
        return value

    # -- nonlinearities ------------------------------------------------------------------------

    def _bend_op(self, node: fx.Node) -> Value:
        return _bend(self._same(self._operands(node)[:1]))

    def _glu(self, node: fx.Node) -> Value:
        data = self._operands(node)[0]
        if not isinstance(data.value, Projection):
            return _bend(data.value)
        gate = replace(data.value, bent=True)
        return Product(gate, data.value, data.node, data.node)

    def _softmax(self, node: fx.Node) -> Value:
        value = self._same(self._operands(node)[:1])
        if isinstance(value, Scores) and value.softmax is None:
            return replace(value, softmax=node)
        return _bend(value)

    def _pick(self, node: fx.Node) -> Value:
        value = self._same(self._operands(node)[:1])
        return Routed(value.use) if isinstance(value, Projection) else value

    # -- sums ----------------------------------------------------------------------------------

    def _add(self, node: fx.Node) -> Value:
        data = self._operands(node)
        total = data[0]
        for other in data[1:]:
            total = Operand(self._sum(node, total, other), node)
        return total.value if data else Fixed()

    def _sum(self, node: fx.Node, a: Operand, b: Operand) -> Value:
        x, y = a.value, b.value
        if isinstance(x, Scores) or isinstance(y, Scores):
            return self._score_sum(x, y)
        if isinstance(x, Fixed) or isinstance(y, Fixed):
            return self._sum_with_fixed(a, b)
        if x == y and not isinstance(x, Stream):
            return x
        modulated = self._modulated(node, a, b)
        if modulated is not None:
            return modulated
        self.evidence.additions.append(node)
        if isinstance(x, Projection) and isinstance(y, Projection):
            return self._sum_of_projections(x, y)
        if isinstance(x, Attended) and isinstance(y, Attended):
            return Attended(x.cores | y.cores, x.gates | y.gates)
        for one, other in ((x, y), (y, x)):
            if isinstance(one, Attended) and self._from_value_of(one, other):
                return one
        return x if isinstance(x, Routed) and x == y else STREAM

    def _sum_with_fixed(self, a: Operand, b: Operand) -> Value:
        live, fixed = (b, a) if isinstance(a.value, Fixed) else (a, b)
        added = cast("Fixed", fixed.value)
        if isinstance(live.value, Fixed):
            return _merge([live.value, added])
        if added.source == "float" and shape(live.node) == shape(fixed.node):
            return STREAM  # a residual around the first layer, straight from the input
        if len(added.parameters) == 1:
            name = added.parameters[0]
            self.evidence.shifts.setdefault(name, set()).update(uses_in(live.value))
            if self._one_per_position(live.node, fixed.node):
                self.evidence.positions.setdefault(name, []).append(live.value)
        return live.value

    def _one_per_position(self, states: fx.Node, table: fx.Node) -> bool:
        """Whether a tensor has an entry for every element of one example of the states."""
        whole, part = shape(states), shape(table)
        example = whole[1:]
        return len(example) > 1 and part[-len(example) :] == example

    def _sum_of_projections(self, x: Projection, y: Projection) -> Value:
        if x.use == y.use:
            return replace(x, bent=x.bent or y.bent)
        uses = self.evidence.uses
        if uses[x.use].site == uses[y.use].site:
            return replace(y, bent=x.bent or y.bent)  # one set of experts, expert by expert
        for one, other in ((x, y), (y, x)):
            # What a rewrite added inside a layer is a part of that layer.
            if uses[other.use].site.startswith(f"{uses[one.use].site}."):
                return one
        return STREAM

    def _from_value_of(self, attended: Attended, other: Value) -> bool:
        """Whether a value is another image of what was attended to (a positional convolution)."""
        values = {u for c in attended.cores for u in uses_in(self.evidence.cores[c].value.value)}
        found = uses_in(other)
        for use in list(found):
            found |= uses_in(self.evidence.uses[use].data)
        return bool(values & found)

    def _score_sum(self, x: Value, y: Value) -> Value:
        if isinstance(x, Scores) and isinstance(y, Scores):
            return Scores(
                (*x.terms, *(term for term in y.terms if term not in x.terms)),
                x.biases | y.biases,
                x.tables | y.tables,
                x.mixers | y.mixers,
                x.softmax or y.softmax,
                x.bent or y.bent,
            )
        scores, added = (x, y) if isinstance(x, Scores) else (y, cast("Scores", x))
        scores = cast("Scores", scores)
        if isinstance(added, Fixed):
            return replace(scores, tables=scores.tables | set(added.parameters))
        return replace(scores, biases=scores.biases | uses_in(added))

    # -- products of elements ------------------------------------------------------------------

    def _multiply(self, node: fx.Node) -> Value:
        data = self._operands(node)
        if len(data) < 2:
            return data[0].value if data else Fixed()
        a, b = data[:2]
        x, y = a.value, b.value
        if isinstance(x, Fixed) or isinstance(y, Fixed):
            return self._product_with_fixed(a, b)
        if isinstance(x, Scores) or isinstance(y, Scores):
            return x if isinstance(x, Scores) else y
        for one, other in ((x, y), (y, x)):
            if isinstance(one, Routed):
                self.evidence.routers.add(one.use)
                return other
        if isinstance(x, Projection) and isinstance(y, Projection) and x.use == y.use:
            return self._product_of_one(a, b)
        if x == y:
            return x
        modulated = self._modulated(node, a, b)
        if modulated is not None:
            return modulated
        if isinstance(x, Projection) and isinstance(y, Projection):
            return self._gated(a, b)
        for one, other in ((x, y), (y, x)):
            if isinstance(one, Attended) and isinstance(other, Projection):
                return replace(one, gates=one.gates | {other.use})
        return STREAM

    def _product_with_fixed(self, a: Operand, b: Operand) -> Value:
        live, fixed = (b, a) if isinstance(a.value, Fixed) else (a, b)
        factor = cast("Fixed", fixed.value)
        if isinstance(live.value, Fixed):
            return _merge([live.value, factor], scaled=True)
        if len(factor.parameters) == 1 and not isinstance(live.value, Scores):
            self.evidence.scales.add(factor.parameters[0])
        return live.value

    def _product_of_one(self, a: Operand, b: Operand) -> Value:
        """Two images of one projection: an activation such as x·σ(x), or a fused gated unit."""
        x, y = cast("Projection", a.value), cast("Projection", b.value)
        use = self.evidence.uses[x.use]
        indices = self.indices(use.node, use.axis)
        left, right = indices.features(a.node), indices.features(b.node)
        if left is None or right is None or left == right:
            return replace(x, bent=x.bent or y.bent)
        return _product(a, b)

    def _gated(self, a: Operand, b: Operand) -> Value:
        """Two projections of the same input multiplied; anything else mixes them."""
        uses = self.evidence.uses
        first = uses[cast("Projection", a.value).use]
        second = uses[cast("Projection", b.value).use]
        alike = self._origin(first.data_node) is self._origin(second.data_node)
        return _product(a, b) if alike else STREAM

    def _origin(self, node: fx.Node) -> fx.Node:
        """The node that a tensor is a view of."""
        while node.op in ("call_function", "call_method") and op_kind(node) is Kind.VIEW:
            node = operands(node)[0]
        return node

    def _modulated(self, node: fx.Node, a: Operand, b: Operand) -> Value | None:
        """The other operand, if one is a projection that scales or shifts all its positions alike.

        What scales must not depend on what is scaled: it lacks an input that the other has.
        """
        for one, other in ((a, b), (b, a)):
            if not isinstance(one.value, Projection | Joined):
                continue
            small, large = shape(one.node), shape(other.node)
            if len(small) != len(large) or not self._is_spread(small, large):
                continue
            mine, theirs = self.inputs(one.node), self.inputs(other.node)
            if mine | theirs == mine:
                continue
            self.evidence.modulators.setdefault(node, set()).update(uses_in(one.value))
            return other.value
        return None

    def _is_spread(self, small: tuple[int, ...], large: tuple[int, ...]) -> bool:
        return all(x in (1, y) for x, y in zip(small, large, strict=True)) and any(
            x == 1 and y > 1 for x, y in zip(small[1:], large[1:], strict=True)
        )

    # -- matrix products -----------------------------------------------------------------------

    def _linear(self, node: fx.Node) -> Value:
        data, weight, *_ = self._operands(node)
        return self._weigh(node, data, weight, (data, weight))

    def _convolve(self, node: fx.Node) -> Value:
        data, weight, *_ = self._operands(node)
        kernel = shape(weight.node)[2:]
        groups = next((g for g in (argument(node, 6, "groups"),) if isinstance(g, int)), 1)
        name = self._weight_name(weight.value)
        if name is None:
            return STREAM
        pointwise = set(kernel) == {1} and groups == 1
        axis = len(shape(node)) - len(kernel) - 1
        return self._apply(node, self._site_of(name), data, "conv", pointwise, axis, groups != 1)

    def _lookup(self, node: fx.Node) -> Value:
        index, table, *_ = self._operands(node)
        name = self._weight_name(table.value)
        if name is None:
            return table.value
        return self._look_up(node, self._site_of(name), index, self._parameters[name][0])

    def _matmul(self, node: fx.Node) -> Value:
        data = self._operands(node)
        if op_name(node) in ("addmm", "baddbmm", "addbmm"):
            made = self._matrix_product(node, data[1], data[2])
            return self._sum(node, Operand(made, node), data[0])
        if len(data) < 2:
            return self._same(data)
        return self._matrix_product(node, data[0], data[1])

    def _einsum(self, node: fx.Node) -> Value:
        data = self._operands(node)
        return self._matrix_product(node, *data) if len(data) == 2 else self._same(data)

    def _matrix_product(self, node: fx.Node, a: Operand, b: Operand) -> Value:
        for data, weight in ((a, b), (b, a)):
            if self._weight_name(weight.value) is not None and not self._is_weight(data.value):
                return self._weigh(node, data, weight, (a, b))
        if isinstance(a.value, Fixed) or isinstance(b.value, Fixed):
            return self._same([a, b])
        for scores, other in ((a, b), (b, a)):
            if isinstance(scores.value, Scores):
                return self._attend_to(node, scores.value, other)
        return Scores((Term(a, b, node),))

    def _weigh(
        self, node: fx.Node, data: Operand, weight: Operand, pair: tuple[Operand, Operand]
    ) -> Value:
        name = self._weight_name(weight.value)
        if name is None:
            return Scores((Term(*pair, node),)) if not isinstance(data.value, Fixed) else STREAM
        return self._apply(node, self._site_of(name), data, "linear", True)

    def _weight_name(self, value: Value) -> str | None:
        """The parameter a tensor is a view or a function of: a weight to be applied."""
        if not isinstance(value, Fixed) or value.source not in (None, "derived"):
            return None
        matrices = [name for name in value.parameters if len(self._parameters[name]) > 1]
        originals = [name for name in matrices if ".parametrizations." in name]
        return next(iter([*originals, *matrices]), None)

    def _is_weight(self, value: Value) -> bool:
        return isinstance(value, Fixed) and value.source is None and not value.parameters

    def _attend(self, node: fx.Node) -> Value:
        query, key, value, *rest = self._operands(node)
        mask = rest[0].value if rest else None
        self._note_scores(mask)
        return self._attended(
            Core(len(self.evidence.cores), _owner(node), query, key, value, mask=mask)
        )

    def _note_scores(self, added: Value | Scores | None) -> None:
        if isinstance(added, Scores):
            self.evidence.tables |= added.tables
            self.evidence.biases |= added.biases
            self.evidence.mixers |= added.mixers
        elif isinstance(added, Fixed):
            self.evidence.tables.update(added.parameters)
        elif added is not None:
            self.evidence.biases |= uses_in(added)

    def _attend_to(self, node: fx.Node, scores: Scores, value: Operand) -> Value:
        index = len(self.evidence.cores)
        if scores.softmax is not None:
            self._note_scores(scores)
            query, key = self._query_and_key(scores)
            return self._attended(Core(index, _owner(node), query, key, value, scores))
        core = _kernel_attention(index, _owner(node), scores.terms[0], value, bent=scores.bent)
        return STREAM if core is None else self._attended(core)

    def _attended(self, core: Core) -> Value:
        self.evidence.cores.append(core)
        return Attended(frozenset({core.index}))

    def _query_and_key(self, scores: Scores) -> tuple[Operand, Operand]:
        """The factors of the scores: the key is the one whose positions the softmax runs over."""
        direct = [term for term in scores.terms if not term.indirect] or list(scores.terms)
        term = direct[0]
        rows, columns = _factors(term)
        softmax = cast("fx.Node", scores.softmax)
        along = argument(softmax, 1, "dim")
        if along is None:
            along = softmax.kwargs.get("axis", -1)
        found = self.indices(term.node, len(shape(term.node)) - 1).at(operands(softmax)[0])
        if isinstance(along, int) and found is not None and max(found.shape) > 1:
            others = [axis for axis in range(found.dim()) if varies_along(found, axis)]
            if others and along % found.dim() not in others:
                return columns, rows
        return rows, columns


def _owner(node: fx.Node) -> str:
    return str(node.meta.get("owner", ""))


def _factors(term: Term) -> tuple[Operand, Operand]:
    """The factors that count the rows and the columns of a product."""
    if op_name(term.node) != "einsum":
        return term.left, term.right
    equation = str(term.node.args[0]).replace(" ", "")
    sides, _, result = equation.partition("->")
    left, _, _ = sides.partition(",")
    return (term.right, term.left) if result and result[-1] in left else (term.left, term.right)


def _kernel_attention(
    index: int, owner: str, term: Term, third: Operand, *, bent: bool
) -> Core | None:
    """An attention without softmax: key and value meet first, or query and key do.

    A feature map is applied to queries and keys but not to values, which tells them apart.
    """
    parts = [term.left, term.right, third]
    if not all(uses_in(part.value) for part in parts):
        return None
    plain = [part for part in parts if not _is_bent(part.value)]
    if bent:
        return Core(index, owner, term.left, term.right, third)
    if len(plain) == 1 and plain[0] is not third:
        key = term.right if plain[0] is term.left else term.left
        return Core(index, owner, third, key, plain[0])
    return Core(index, owner, third, term.left, term.right, ordered=False)


def _is_bent(value: Value) -> bool:
    parts = value.parts if isinstance(value, Joined) else (value,)
    return any(isinstance(part, Projection) and part.bent for part in parts)


def _product(a: Operand, b: Operand) -> Product:
    x, y = cast("Projection", a.value), cast("Projection", b.value)
    if x.bent == y.bent:
        return Product(x, y, a.node, b.node, ordered=False)
    return Product(x, y, a.node, b.node) if x.bent else Product(y, x, b.node, a.node)


def uses_in(value: Value) -> set[int]:
    """The uses of weights a value was made by, as far as they are known."""
    if isinstance(value, Projection):
        return {value.use}
    if isinstance(value, Product):
        return {value.gate.use, value.value.use}
    if isinstance(value, Joined):
        return set[int]().union(*(uses_in(part) for part in value.parts))
    return set()


def _bend(value: Value) -> Value:
    if isinstance(value, Projection):
        return replace(value, bent=True)
    if isinstance(value, Scores) and value.softmax is None:
        return replace(value, bent=True)
    if isinstance(value, Joined):
        return _join([_bend(part) for part in value.parts])
    return value


def _join(values: Iterable[Value]) -> Value:
    """Several tensors in one: what is fixed says nothing beside what layers made."""
    parts: list[Value] = []
    for value in values:
        parts.extend(value.parts if isinstance(value, Joined) else (value,))
    live = list(dict.fromkeys(part for part in parts if not isinstance(part, Fixed)))
    if not live:
        return _merge(parts)
    if len(live) == 1:
        return live[0]
    if any(isinstance(part, Stream | Scores) for part in live):
        return next((part for part in live if isinstance(part, Scores)), STREAM)
    projections = {p.use for p in live if isinstance(p, Projection)}
    if len(projections) == 1 and all(isinstance(p, Projection) for p in live):
        # The halves of a rotated vector, one of them activated or not: one projection still.
        return Projection(projections.pop(), bent=any(_is_bent(p) for p in live))
    return Joined(tuple(live))


def _merge(values: Iterable[Value], *, scaled: bool = False) -> Value:
    """The result of an operation that nothing better is known of."""
    values = list(values)
    live = list(dict.fromkeys(value for value in values if not isinstance(value, Fixed)))
    if len(live) == 1:
        return live[0]
    if live:
        routed = [value for value in live if isinstance(value, Routed)]
        projections = {value.use for value in live if isinstance(value, Projection)}
        if len(live) == len(routed):
            return routed[0]
        if len(projections) == 1 and all(isinstance(value, Projection) for value in live):
            return Projection(projections.pop(), bent=True)
        return STREAM
    fixed = [value for value in values if isinstance(value, Fixed)]
    parameters = tuple(dict.fromkeys(name for value in fixed for name in value.parameters))
    sources = {value.source for value in fixed} - {None}
    if not sources:
        return Fixed(parameters)
    if sources == {"float"}:
        return Fixed(parameters, "float")
    single = len(fixed) == 1 or (scaled and len(sources) == 1)
    return Fixed(parameters, "index" if single and sources == {"index"} and scaled else "derived")


_HANDLERS: dict[Kind, Callable[[Dataflow, fx.Node], Value]] = {
    Kind.VIEW: Dataflow._view,
    Kind.JOIN: Dataflow._join_op,
    Kind.ADD: Dataflow._add,
    Kind.MULTIPLY: Dataflow._multiply,
    Kind.BEND: Dataflow._bend_op,
    Kind.GLU: Dataflow._glu,
    Kind.SOFTMAX: Dataflow._softmax,
    Kind.PICK: Dataflow._pick,
    Kind.GATHER: Dataflow._gather,
    Kind.ATTEND: Dataflow._attend,
    Kind.MATMUL: Dataflow._matmul,
    Kind.EINSUM: Dataflow._einsum,
    Kind.LINEAR: Dataflow._linear,
    Kind.CONVOLVE: Dataflow._convolve,
    Kind.LOOKUP: Dataflow._lookup,
    Kind.NORMALISE: Dataflow._normalise,
    Kind.PASS: Dataflow._pass,
}
