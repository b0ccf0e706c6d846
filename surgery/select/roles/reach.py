"""Where a layer's output goes before another weight takes it up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from surgery.capture.nodes import operands
from surgery.select.roles.algebra import uses_in
from surgery.select.roles.dataflow import Dataflow
from surgery.select.roles.ops import Kind, op_kind, shape
from surgery.select.roles.values import Fixed, Use


def after(flow: Dataflow, use: Use, *, straight: bool = False) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every (from, to) edge on which a layer's output travels, up to the next weights.

    The edge into the next weight, attention or model output is given, and not followed. So is one
    on which the output scales or shifts something else, and with ``straight`` one into a
    nonlinearity.
    """
    seen: set[fx.Node] = set()
    waiting = [use.node]
    while waiting:
        node = waiting.pop(0)
        for user in node.users:
            if node not in operands(user):
                continue
            yield node, user
            bends = straight and op_kind(user) in (Kind.BEND, Kind.SOFTMAX, Kind.GLU)
            if user not in seen and not bends and not _ends(flow, node, user):
                seen.add(user)
                waiting.append(user)


def _ends(flow: Dataflow, node: fx.Node, user: fx.Node) -> bool:
    if user.op == "output" or user in flow.fresh or op_kind(user) is Kind.ATTEND:
        return True
    return modulates(flow, node, user)


def modulates(flow: Dataflow, node: fx.Node, user: fx.Node) -> bool:
    """Whether a tensor scales or shifts another at ``user``."""
    uses = uses_in(flow.value(node))
    return bool(uses) and uses <= flow.evidence.modulators.get(user, set())


@dataclass(frozen=True)
class Ends:
    """Where a layer's output ends up.

    Attributes:
        uses: The uses of weights that take it, or that it modulates together with.
        attends: Whether an attention takes it without a weight between.
        leaves: Whether it reaches an output of the model without a weight between.
    """

    uses: frozenset[int]
    attends: bool
    leaves: bool

    @property
    def elsewhere(self) -> bool:
        """Whether it goes anywhere but to weights."""
        return self.attends or self.leaves


def ends_of(flow: Dataflow, use: Use) -> Ends:
    """Where a layer's output ends up."""
    found: set[int] = set()
    attends = leaves = False
    for node, user in after(flow, use):
        if user in flow.fresh:
            found.add(flow.fresh[user])
        elif modulates(flow, node, user):
            found |= flow.evidence.modulators[user]
        leaves = leaves or user.op == "output"
        attends = attends or (user.op != "output" and op_kind(user) is Kind.ATTEND)
    return Ends(frozenset(found), attends, leaves)


def joins_residual(flow: Dataflow, start: fx.Node, use: Use, *, straight: bool = False) -> bool:
    """Whether a layer's output is added to something that ``start`` was computed from.

    With ``straight``, no nonlinearity may lie between: a factor made by a sigmoid is no branch.
    """
    for node, user in after(flow, use, straight=straight):
        if op_kind(user) is not Kind.ADD or user.op == "output":
            continue
        for other in operands(user):
            alike = shape(other) == shape(user)
            if other is node or not alike:
                continue
            if any(_precedes(flow, part, start) for part in _summands(flow, other, start)):
                return True
    return False


def _summands(flow: Dataflow, node: fx.Node, start: fx.Node) -> Iterator[fx.Node]:
    """What was added up in ``node`` after ``start``: a parallel branch beside the shortcut."""
    if op_kind(node) is not Kind.ADD or flow.order[node] < flow.order[start]:
        yield node
        return
    for part in operands(node):
        if shape(part) == shape(node):
            yield from _summands(flow, part, start)


def _precedes(flow: Dataflow, early: fx.Node, late: fx.Node) -> bool:
    """Whether ``early``, or what it is a view of, is an ancestor of ``late`` or ``late`` itself."""
    source = origin(flow, early)
    floor = flow.order[source]
    seen = {late}
    waiting = [late]
    while waiting:
        node = waiting.pop()
        if node is source:
            return True
        for each in operands(node):
            if each not in seen and flow.order[each] >= floor:
                seen.add(each)
                waiting.append(each)
    return False


def origin(flow: Dataflow, node: fx.Node) -> fx.Node:
    """The node that a tensor is a view, a cast or a scaled copy of."""
    while node.op in ("call_function", "call_method") and operands(node):
        live = [each for each in operands(node) if not isinstance(flow.value(each), Fixed)]
        scaled = op_kind(node) is Kind.MULTIPLY and len(live) == 1
        if not scaled and op_kind(node) is not Kind.VIEW:
            break
        node = live[0] if scaled else operands(node)[0]
    return node


def becomes_tokens(flow: Dataflow, use: Use) -> bool:
    """Whether a map of features is flattened into a sequence before the next weight."""
    rank = len(shape(use.node))
    return any(
        user.op in ("call_function", "call_method")
        and op_kind(user) is Kind.VIEW
        and len(shape(user)) == rank - 1
        for _, user in after(flow, use)
    )
