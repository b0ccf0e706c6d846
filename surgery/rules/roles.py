"""The roles a layer can play. ``surgery.select`` resolves them from a model's structure."""

from __future__ import annotations

from collections.abc import Mapping

ROLES: Mapping[str, str] = {
    "attention.q": "projects to queries",
    "attention.k": "projects to keys",
    "attention.v": "projects to values",
    "attention.qk": "projects to queries and keys at once",
    "attention.kv": "projects to keys and values at once",
    "attention.qkv": "projects to queries, keys and values at once",
    "attention.out": "projects what the attention returns",
    "mlp.in": "widens in a feed-forward layer",
    "mlp.gate": "computes the gate of a feed-forward layer",
    "mlp.gate_in": "gates and widens at once, in a fused feed-forward layer",
    "mlp.out": "narrows again in a feed-forward layer",
    "router": "scores the experts of a mixture",
    "norm": "normalises",
    "embed": "turns tokens, positions or patches into vectors",
    "head": "turns the last states into the model's output",
    "conv": "a convolution that plays none of the roles above",
}
"""Role → what a layer in it does. This list is what a rule may name."""

GROUPS: Mapping[str, str] = {
    "attention": "every projection of an attention layer",
    "mlp": "every matrix of a feed-forward layer",
}
"""Group → what it means: all roles whose names start with it."""

PARTS: Mapping[str, frozenset[str]] = {
    "attention.q": frozenset({"q"}),
    "attention.k": frozenset({"k"}),
    "attention.v": frozenset({"v"}),
    "attention.qk": frozenset({"q", "k"}),
    "attention.kv": frozenset({"k", "v"}),
    "attention.qkv": frozenset({"q", "k", "v"}),
    "mlp.in": frozenset({"in"}),
    "mlp.gate": frozenset({"gate"}),
    "mlp.gate_in": frozenset({"gate", "in"}),
}
"""What a role is made of, where one layer can do the work of several."""
