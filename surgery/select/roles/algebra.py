"""What becomes of values when tensors are added, joined or bent: the algebra of ``values.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from typing import cast

from torch import fx

from surgery.capture.nodes import op_name
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
    Value,
)


def owner(node: fx.Node) -> str:
    """Path of the module that computes a node."""
    return str(node.meta.get("owner", ""))


def factors(term: Term) -> tuple[Operand, Operand]:
    """The factors that count the rows and the columns of a product."""
    if op_name(term.node) != "einsum":
        return term.left, term.right
    equation = str(term.node.args[0]).replace(" ", "")
    sides, _, result = equation.partition("->")
    left, _, _ = sides.partition(",")
    return (term.right, term.left) if result and result[-1] in left else (term.left, term.right)


def kernel_attention(
    index: int, owner: str, term: Term, third: Operand, *, bent: bool
) -> Core | None:
    """An attention without softmax: key and value meet first, or query and key do.

    A feature map is applied to queries and keys but not to values, which tells them apart.
    """
    parts = [term.left, term.right, third]
    if not all(uses_in(part.value) for part in parts):
        return None
    plain = [part for part in parts if not is_bent(part.value)]
    if bent:
        return Core(index, owner, term.left, term.right, third)
    if len(plain) == 1 and plain[0] is not third:
        key = term.right if plain[0] is term.left else term.left
        return Core(index, owner, third, key, plain[0])
    return Core(index, owner, third, term.left, term.right, ordered=False)


def add_scores(x: Scores, y: Scores) -> Scores:
    """Attention scores that are sums of others."""
    return Scores(
        (*x.terms, *(term for term in y.terms if term not in x.terms)),
        x.biases | y.biases,
        x.tables | y.tables,
        x.mixers | y.mixers,
        x.softmax or y.softmax,
        x.bent or y.bent,
    )


def is_bent(value: Value) -> bool:
    """Whether a projection in a value went through a nonlinearity."""
    parts = value.parts if isinstance(value, Joined) else (value,)
    return any(isinstance(part, Projection) and part.bent for part in parts)


def product(a: Operand, b: Operand) -> Product:
    """Two projections multiplied: the gate is the one that went through a nonlinearity."""
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


def summands(value: Value) -> set[int]:
    """The uses of weights that a value is the sum of, or was made by."""
    return set(value.summands) if isinstance(value, Stream) else uses_in(value)


def bend(value: Value) -> Value:
    """A value after a nonlinearity."""
    if isinstance(value, Projection):
        return replace(value, bent=True)
    if isinstance(value, Scores) and value.softmax is None:
        return replace(value, bent=True)
    if isinstance(value, Joined):
        return join([bend(part) for part in value.parts])
    return value


def join(values: Iterable[Value]) -> Value:
    """Several tensors in one: what is fixed says nothing beside what layers made."""
    parts: list[Value] = []
    for value in values:
        parts.extend(value.parts if isinstance(value, Joined) else (value,))
    live = list(dict.fromkeys(part for part in parts if not isinstance(part, Fixed)))
    if not live:
        return merge(parts, kept=True)
    if len(live) == 1:
        return live[0]
    scores = [part for part in live if isinstance(part, Scores)]
    if len(scores) == len(live):
        return reduce(add_scores, scores)
    if scores or any(isinstance(part, Stream) for part in live):
        attended = [part for part in live if isinstance(part, Attended)]
        return Joined((*attended, STREAM)) if attended else STREAM
    projections = {p.use for p in live if isinstance(p, Projection)}
    if len(projections) == 1 and all(isinstance(p, Projection) for p in live):
        # The halves of a rotated vector, one of them activated or not: one projection still.
        return Projection(projections.pop(), bent=any(is_bent(p) for p in live))
    return Joined(tuple(live))


def merge(values: Iterable[Value], *, kept: bool = False) -> Value:
    """The result of an operation that nothing better is known of.

    With ``kept``, its elements are among those of the operands, or those of one scaled.
    """
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
    parameters = _hosts(dict.fromkeys(name for value in fixed for name in value.parameters))
    sources = {value.source for value in fixed} - {None}
    if not sources:
        return Fixed(parameters)
    if sources == {"float"}:
        return Fixed(parameters, "float")
    return Fixed(parameters, "index" if kept and sources == {"index"} else "derived")


def _hosts(names: Iterable[str]) -> tuple[str, ...]:
    """Parameters, less those that a rewrite put inside the layer of another of them."""
    known = tuple(names)
    return tuple(name for name in known if not any(_inside(name, other) for other in known))


def _inside(name: str, host: str) -> bool:
    home, _, parameter = host.rpartition(".")
    rest = name.removeprefix(f"{home}.") if home else name
    if "." not in rest or (home and rest == name):
        return False
    return bool(home) or parameter in name.split(".")
