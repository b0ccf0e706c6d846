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
    "attention.gate": "gates what the attention returns, before the output projection",
    "attention.latent": "compresses the input of query, key or value projections",
    "attention.position": "makes scores of relative positions",
    "attention_bias": "is added to attention scores: a table, or what computes it",
    "attention_scores": "is applied to attention scores, mixing heads",
    "mlp.in": "widens in a feed-forward layer",
    "mlp.gate": "computes the gate of a feed-forward layer",
    "mlp.gate_in": "gates and widens at once, in a fused feed-forward layer",
    "mlp.out": "narrows again in a feed-forward layer",
    "router": "scores the experts of a mixture",
    "norm": "normalises",
    "embed.token": "turns tokens into vectors",
    "embed.position": "gives each position a vector",
    "embed.type": "gives each type of token a vector",
    "embed.class": "gives each class of example a vector",
    "embed.patch": "turns patches of an image, or frames, into vectors",
    "embed.input": "turns a continuous input into states",
    "embed.learned": "learned vectors beside the sequence, or in place of an input",
    "head": "turns the last states into the model's output",
    "modulation": "scales or shifts the states, all positions alike",
    "conditioning": "reaches the states through modulation alone",
    "scale": "multiplies the states feature by feature",
    "conv": "a convolution that plays none of the roles above",
}
"""Role → what a layer in it does. This list is what a rule may name."""

GROUPS: Mapping[str, str] = {
    "attention": "every projection of an attention layer",
    "mlp": "every matrix of a feed-forward layer",
    "embed": "everything that turns inputs into vectors",
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
