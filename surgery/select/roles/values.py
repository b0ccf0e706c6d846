"""What is known of a tensor in a trace: where it came from, as far as roles depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Fixed:
    """Made without any layer: from parameters, positions, constants, or an input as it is.

    Attributes:
        parameters: Names of the parameters it was made of.
        source: ``float`` or ``index`` if it is an input of that type, at most rearranged or
            scaled; ``derived`` if it was computed from one otherwise; None if it needs none.
    """

    parameters: tuple[str, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class Projection:
    """What one weight made, through anything that mixes in no other weight.

    Attributes:
        use: Index of the weight's use.
        bent: Whether a nonlinearity was passed.
    """

    use: int
    bent: bool = False


@dataclass(frozen=True)
class Product:
    """A projection times another that went through a nonlinearity: a gated unit.

    Attributes:
        gate: The factor behind the nonlinearity. If both or neither are, the two cannot be told
            apart and ``ordered`` is False.
        value: The other factor.
        gate_node: Node of the gate.
        value_node: Node of the value; the same as ``gate_node`` for one that halves its input.
    """

    gate: Projection
    value: Projection
    gate_node: fx.Node
    value_node: fx.Node
    ordered: bool = True


@dataclass(frozen=True)
class Joined:
    """Several tensors side by side."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Operand:
    """One factor of a matrix product: what it is and the node it is at."""

    value: Value
    node: fx.Node


@dataclass(frozen=True)
class Term:
    """One matrix product within attention scores.

    Attributes:
        left, right: Its factors.
        node: The product.
        indirect: Whether it reached the scores through a gather, as relative positions do.
    """

    left: Operand
    right: Operand
    node: fx.Node
    indirect: bool = False


@dataclass(frozen=True)
class Scores:
    """A product of two activations: attention scores, if a softmax and another product follow.

    Attributes:
        terms: The products that were added up.
        biases: Uses of weights whose output was added.
        tables: Parameters that were added as they are.
        mixers: Uses of weights that were applied to the scores themselves.
        softmax: The softmax node, once passed.
        bent: Whether another nonlinearity was passed.
    """

    terms: tuple[Term, ...]
    biases: frozenset[int] = frozenset()
    tables: frozenset[str] = frozenset()
    mixers: frozenset[int] = frozenset()
    softmax: fx.Node | None = None
    bent: bool = False


@dataclass(frozen=True)
class Attended:
    """What one or more attentions returned.

    Attributes:
        cores: Indices of the attentions.
        gates: Uses of weights that multiplied it.
    """

    cores: frozenset[int]
    gates: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Routed:
    """A choice made by the scores of a weight: indices, or the weights of the chosen."""

    use: int


@dataclass(frozen=True)
class Stream:
    """A mixture of several layers' outputs, such as the residual stream.

    Attributes:
        summands: If it is the sum of a few projections and nothing else, their uses.
    """

    summands: frozenset[int] = frozenset()


Value = Fixed | Projection | Product | Joined | Scores | Attended | Routed | Stream
STREAM = Stream()


@dataclass(frozen=True)
class Use:
    """One application of a weight.

    Attributes:
        index: Its place among the uses.
        node: The node that applies it.
        site: Path of the site the weight belongs to.
        kind: ``linear``, ``conv`` or ``table``.
        data: What it is applied to.
        data_node: The node it is applied to.
        pointwise: Whether each position is transformed by itself: a linear layer, or a 1×1
            convolution without groups.
        axis: The axis of its output that counts its features.
        rows: Of a table, how many rows it has.
        weight: If a parameter was applied, and not a layer: its name, and the node of the view or
            function of it that was.
    """

    index: int
    node: fx.Node
    site: str
    kind: str
    data: Value
    data_node: fx.Node
    pointwise: bool
    axis: int
    rows: int = 0
    weight: tuple[str, fx.Node] | None = None


@dataclass(frozen=True)
class Core:
    """One attention: a query, a key and a value that meet.

    Attributes:
        index: Its place among the attentions.
        owner: Path of the module it is computed in.
        query, key, value: Its operands; a key and value, or query and key, that cannot be told
            apart leave ``ordered`` False.
        scores: What the softmax was taken of; None for a fused attention.
        mask: What a fused attention adds to its scores.
    """

    index: int
    owner: str
    query: Operand
    key: Operand
    value: Operand
    scores: Scores | None = None
    mask: Value | None = None
    ordered: bool = True
