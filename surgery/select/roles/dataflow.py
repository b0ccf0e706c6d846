"""What every tensor of a trace was made of, in one pass from the inputs to the outputs.

Each node gets a ``Value`` (see ``values.py``). On the way the facts that roles rest on are noted:
every use of a weight with what it was applied to, every attention with its query, key and value,
and what was added to or multiplied with what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import cast

from torch import fx, nn

from surgery.capture.nodes import op_name, operands, spec, specs
from surgery.select.roles.algebra import (
    add_scores,
    bend,
    factors,
    join,
    kernel_attention,
    merge,
    owner,
    product,
    summands,
    uses_in,
)
from surgery.select.roles.evidence import Evidence
from surgery.select.roles.features import Indices, as_features, origin_of, varies_along
from surgery.select.roles.ops import (
    ALIASES,
    Convolution,
    Kind,
    Windows,
    argument,
    module_kind,
    op_kind,
    shape,
)
from surgery.select.roles.role import Features
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
# Terms of a position bias: one per axis of space and time.
_FEW = 3


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
        self._into: dict[fx.Node, list[fx.Node]] = {}
        self._fresh: dict[fx.Node, int] = {}
        self._placeholders = 0
        self._handlers: dict[Kind, Callable[[fx.Node], Value]] = {
            Kind.VIEW: self._view,
            Kind.JOIN: self._join_op,
            Kind.ADD: self._add,
            Kind.MULTIPLY: self._multiply,
            Kind.BEND: self._bend_op,
            Kind.GLU: self._glu,
            Kind.SOFTMAX: self._softmax,
            Kind.PICK: self._pick,
            Kind.GATHER: self._gather,
            Kind.ATTEND: self._attend,
            Kind.MATMUL: self._matmul,
            Kind.EINSUM: self._einsum,
            Kind.LINEAR: self._linear,
            Kind.CONVOLVE: self._convolve,
            Kind.LOOKUP: self._lookup,
            Kind.NORMALISE: self._normalise,
            Kind.MAKE: self._make,
            Kind.PASS: self._pass,
        }
        self.order: dict[fx.Node, int] = {}
        for at, node in enumerate(graph.nodes):
            self.order[node] = at
            writes = bool(node.meta.get("mutates"))
            if node.op != "output" and (writes or specs(node)):
                self._inputs[node] = self._reach(node)
                self._values[node] = self._visit(node)
            if writes:
                self._note_write(node)

    def value(self, node: fx.Node) -> Value:
        """What a node's tensor was made of."""
        return self._values[node]

    def inputs(self, node: fx.Node) -> int:
        """The inputs of the model that a node depends on, as a bit set."""
        return self._inputs.get(node, 0)

    def indices(self, source: fx.Node, axis: int) -> Indices:
        """The indices along an axis of a node's tensor, to be looked up at later nodes."""
        return Indices(source, axis, self._order_of, self._is_opaque)

    def rows(self, use: Use, features: Features) -> Features | None:
        """The features of a whole weight that those of a use are, if it applies only a part of it.

        None if they cannot be told.
        """
        if use.weight is None or len(self._parameters[use.weight[0]]) != 2:
            return features
        name, part = use.weight
        if shape(part) in (self._parameters[name], self._parameters[name][::-1]):
            return features
        source = origin_of(part)
        if source.op != "get_attr" or op_kind(use.node) is not Kind.LINEAR:
            return None
        found = self.indices(source, 0).at(part)
        if found is None or found.dim() != 2:
            return None
        chosen = range(*features) if isinstance(features, tuple) else features
        return as_features(int(found[at, 0]) for at in chosen)

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
        # What a view is shaped or typed after is not what it holds.
        plain = node.op in ("call_function", "call_method") and op_kind(node) is Kind.VIEW
        for each in operands(node)[:1] if plain else operands(node):
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
        return self._handlers[op_kind(node)](node)

    def _read(self, node: fx.Node, reader: fx.Node) -> Value:
        """The value of an operand, with what was written into its memory before it is read."""
        written = [self._values[w] for w in self._writes(node, reader) if w in self._values]
        return self._values[node] if not written else join([self._values[node], *written])

    def _writes(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        noted = cast("Iterable[fx.Node]", node.meta.get(_WRITTEN, ()))
        writes = dict.fromkeys((*noted, *self._into.get(node, ())))
        before, after = self.order[reader], self.order[node]
        return [w for w in writes if w in self.order and after < self.order[w] < before]

    def _note_write(self, write: fx.Node) -> None:
        """Remember a write with what it writes to and with all that this is a view of."""
        read = operands(write)
        while read:
            target = read[0]
            self._into.setdefault(target, []).append(write)
            read = operands(target) if op_name(target) in ALIASES else []

    def _operands(self, node: fx.Node) -> list[Operand]:
        return [Operand(self._read(each, node), each) for each in operands(node)]

    def _module(self, node: fx.Node) -> Value:
        path = str(node.target)
        module = self._modules[path]
        kind = module_kind(module)
        data = self._operands(node)
        if isinstance(module, Convolution):
            return self._apply_conv(node, path, data[0], Windows.of(module))
        if kind is Kind.LINEAR:
            return self._apply(node, path, data[0], "linear")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            # A class of its own may take no tensor, only a size: it is looked up by position.
            index = data[0] if data else Operand(Fixed(), node)
            return self._look_up(node, path, index, module.num_embeddings)
        return bend(data[0].value) if kind is Kind.BEND else self._same(data)

    def _apply_conv(self, node: fx.Node, site: str, data: Operand, windows: Windows) -> Value:
        axis = len(shape(node)) - len(windows.kernel) - 1
        pointwise = windows.single and windows.groups == 1
        made = self._apply(node, site, data, "conv", pointwise=pointwise, axis=axis)
        whole = isinstance(data.value, Attended) or (
            isinstance(data.value, Projection) and not data.value.bent
        )
        if windows.groups == 1 or not whole:
            return made
        del self._fresh[node]  # it mixes positions, not features: the projection goes through
        return data.value

    def _look_up(self, node: fx.Node, site: str, index: Operand, rows: int) -> Value:
        return self._apply(node, site, index, "table", pointwise=False, rows=rows)

    def _apply(
        self,
        node: fx.Node,
        site: str,
        data: Operand,
        kind: str,
        *,
        pointwise: bool = True,
        axis: int = -1,
        rows: int = 0,
        weight: tuple[str, fx.Node] | None = None,
    ) -> Value:
        """Note that a weight was applied; what it makes is its projection."""
        count = len(self.evidence.uses)
        axis %= max(1, len(shape(node)))
        use = Use(count, node, site, kind, data.value, data.node, pointwise, axis, rows, weight)
        self.evidence.uses.append(use)
        if isinstance(data.value, Scores) and self._mixes_heads(use, data.value):
            return replace(data.value, mixers=data.value.mixers | {use.index})
        self._fresh[node] = use.index
        return Projection(use.index)

    def _mixes_heads(self, use: Use, scores: Scores) -> bool:
        """Whether a weight combines whole score matrices, and not entries of one of them."""
        product = scores.terms[0].node
        rank = len(shape(product))
        found = [self.indices(product, axis).at(use.data_node) for axis in (rank - 2, rank - 1)]
        return all(at is not None and not varies_along(at, use.axis) for at in found)

    def _normalise(self, node: fx.Node) -> Value:
        data = self._operands(node)
        for given in data[1:]:
            if isinstance(given.value, Fixed):
                self.evidence.norms.update(given.value.parameters)
        value = self._same(data[:1])
        return STREAM if isinstance(value, Scores) else value

    def _make(self, node: fx.Node) -> Value:
        return Fixed()

    def _pass(self, node: fx.Node) -> Value:
        return self._same(self._operands(node))

    def _same(self, data: list[Operand]) -> Value:
        """What came out is a function of what went in: of one thing, or of a mixture."""
        return merge([operand.value for operand in data])

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

    def _join_op(self, node: fx.Node) -> Value:
        data = self._operands(node)
        values = [d.value for d in data]
        if op_name(node) in ("cat", "concat", "concatenate"):
            self._note_prefixes(values)
        return join(values)

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
        return bend(self._same(self._operands(node)[:1]))

    def _glu(self, node: fx.Node) -> Value:
        data = self._operands(node)[0]
        if not isinstance(data.value, Projection):
            return bend(data.value)
        gate = replace(data.value, bent=True)
        return Product(gate, data.value, data.node, data.node)

    def _softmax(self, node: fx.Node) -> Value:
        value = self._same(self._operands(node)[:1])
        if isinstance(value, Scores) and value.softmax is None:
            return replace(value, softmax=node)
        return bend(value)

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
        if isinstance(x, Projection) and isinstance(y, Projection):
            return self._sum_of_projections(x, y)
        if isinstance(x, Attended) and isinstance(y, Attended):
            return Attended(x.cores | y.cores, x.gates | y.gates)
        for one, other in ((x, y), (y, x)):
            if isinstance(one, Attended) and self._from_value_of(one, other):
                return one
        return self._mixture(x, y)

    def _mixture(self, x: Value, y: Value) -> Stream:
        """A sum of different things, which is remembered while it is a sum of few projections."""
        parts = (summands(x), summands(y))
        total = parts[0] | parts[1]
        return Stream(frozenset(total)) if all(parts) and len(total) <= _FEW else STREAM

    def _sum_with_fixed(self, a: Operand, b: Operand) -> Value:
        live, fixed = (b, a) if isinstance(a.value, Fixed) else (a, b)
        added = cast("Fixed", fixed.value)
        if isinstance(live.value, Fixed):
            return merge([live.value, added])
        if added.source == "float" and shape(live.node) == shape(fixed.node):
            return STREAM  # a residual around the first layer, straight from the input
        for name in added.parameters:
            self.evidence.shifts.setdefault(name, set()).update(uses_in(live.value))
            if self._one_per_position(live.node, fixed.node):
                self.evidence.positions.setdefault(name, []).append(live.value)
        return live.value

    def _one_per_position(self, states: fx.Node, table: fx.Node) -> bool:
        """Whether a tensor has an entry for every element of one example of the states."""
        whole, part = shape(states), shape(table)
        example = whole[1:]
        several = sum(size > 1 for size in example) > 1
        return several and part[-len(example) :] == example

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
        return self._mixture(x, y)

    def _from_value_of(self, attended: Attended, other: Value) -> bool:
        """Whether a value is another image of what was attended to (a positional convolution)."""
        values = {u for c in attended.cores for u in uses_in(self.evidence.cores[c].value.value)}
        found = uses_in(other)
        for use in list(found):
            found |= uses_in(self.evidence.uses[use].data)
        return bool(values & found)

    def _score_sum(self, x: Value, y: Value) -> Value:
        if isinstance(x, Scores) and isinstance(y, Scores):
            return add_scores(x, y)
        scores, added = (x, y) if isinstance(x, Scores) else (y, cast("Scores", x))
        scores = cast("Scores", scores)
        if isinstance(added, Fixed):
            return replace(scores, tables=scores.tables | set(added.parameters))
        if not summands(added):
            return STREAM  # a product of activations in a residual stream, not scores
        return replace(scores, biases=scores.biases | summands(added))

    # -- products of elements ------------------------------------------------------------------

    def _multiply(self, node: fx.Node) -> Value:
        data = self._operands(node)
        if len(data) < 2:
            return data[0].value if data else Fixed()
        a, b = data[:2]
        x, y = a.value, b.value
        if isinstance(x, Fixed) or isinstance(y, Fixed):
            return self._product_with_fixed(a, b)
        if isinstance(x, Scores) and isinstance(y, Scores) and x.terms == y.terms:
            return x
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
            return merge([live.value, factor], kept=True)
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
        return product(a, b)

    def _gated(self, a: Operand, b: Operand) -> Value:
        """Two projections of the same input multiplied; anything else mixes them."""
        uses = self.evidence.uses
        first = uses[cast("Projection", a.value).use]
        second = uses[cast("Projection", b.value).use]
        if origin_of(first.data_node) is not origin_of(second.data_node):
            return STREAM
        if first.site == second.site:  # applied twice to one input: its output times itself
            return Projection(first.index, bent=True)
        return product(a, b)

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
        name = self._weight_name(weight.value)
        if name is None:
            return STREAM
        windows = Windows.of_call(node, shape(weight.node)[2:])
        return self._apply_conv(node, self._site_of(name), data, windows)

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
            if self._weight_name(weight.value) is not None and not self._is_made(data.value):
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
        site = self._site_of(name)
        return self._apply(node, site, data, "linear", weight=(name, weight.node))

    def _weight_name(self, value: Value) -> str | None:
        """The parameter a tensor is a view or a function of: a weight to be applied."""
        if not isinstance(value, Fixed) or value.source not in (None, "derived"):
            return None
        matrices = [name for name in value.parameters if len(self._parameters[name]) > 1]
        originals = [name for name in matrices if ".parametrizations." in name]
        return next(iter([*originals, *matrices]), None)

    def _is_made(self, value: Value) -> bool:
        return isinstance(value, Fixed) and value.source is None

    def _attend(self, node: fx.Node) -> Value:
        query, key, value, *rest = self._operands(node)
        mask = rest[0].value if rest else None
        self._note_scores(mask)
        return self._attended(
            Core(len(self.evidence.cores), owner(node), query, key, value, mask=mask)
        )

    def _note_scores(self, added: Value | Scores | None) -> None:
        if isinstance(added, Scores):
            self.evidence.tables |= added.tables
            self.evidence.biases |= added.biases
            self.evidence.mixers |= added.mixers
        elif isinstance(added, Fixed):
            self.evidence.tables.update(added.parameters)
        elif added is not None:
            self.evidence.biases |= summands(added)

    def _attend_to(self, node: fx.Node, scores: Scores, value: Operand) -> Value:
        index = len(self.evidence.cores)
        if scores.softmax is not None:
            self._note_scores(scores)
            query, key = self._query_and_key(scores)
            return self._attended(Core(index, owner(node), query, key, value, scores))
        term, *others = scores.terms
        if scores.biases or scores.tables or others:
            return STREAM  # a product that was added to something: states by now, not scores
        core = kernel_attention(index, owner(node), term, value, bent=scores.bent)
        return STREAM if core is None else self._attended(core)

    def _attended(self, core: Core) -> Value:
        self.evidence.cores.append(core)
        return Attended(frozenset({core.index}))

    def _query_and_key(self, scores: Scores) -> tuple[Operand, Operand]:
        """The factors of the scores: the key is the one whose positions the softmax runs over."""
        direct = [term for term in scores.terms if not term.indirect] or list(scores.terms)
        term = direct[0]
        rows, columns = factors(term)
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
