"""The facts that roles rest on, noted while the values of a trace are followed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from surgery.select.roles.values import Core, Use, Value


@dataclass
class Evidence:
    """What was seen on the way.

    Attributes:
        uses: Every application of a weight.
        cores: Every attention.
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
