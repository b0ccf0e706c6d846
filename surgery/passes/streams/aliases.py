"""Which tensors of a graph may share memory: what an operation in place would be seen through."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from surgery.capture import TensorSpec

# What gives a tensor that may live in the memory of its first argument. A child is one too: an
# identity and a dropout hand on what they get.
_VIEWS = frozenset(
    {
        "view", "reshape", "transpose", "permute", "flatten", "unflatten", "squeeze", "unsqueeze",
        "expand", "narrow", "select", "chunk", "split", "unbind", "t", "swapaxes", "swapdims",
        "movedim", "moveaxis", "getitem", "getattr", "detach", "contiguous", "to", "view_as",
        "expand_as", "reshape_as", "unfold", "diagonal", "as_strided", "tensor_split", "float",
        "adjoint", "half", "bfloat16", "double", "type_as", "type", "dropout", "ravel", "real", "imag",
    }
)  # fmt: skip


def read_later(tensor: fx.Node, at: fx.Node) -> bool:
    """True if what ``at`` writes to ``tensor`` may be seen by others than the users of ``at``.

    Another view of the memory may be read after ``at``, or the memory may be the caller's.
    """
    family = _family(tensor)
    if any(member.op in ("placeholder", "get_attr") for member in family):
        return True
    order = _order(at)
    return any(
        order[user] > order[at]
        for member in family
        if order[member] < order[at]
        for user in member.users
    )


def written_later(tensor: fx.Node, since: fx.Node) -> bool:
    """True if something writes to the memory of ``tensor`` at ``since`` or after it."""
    order = _order(since)
    return any(
        user.meta.get("mutates") and order[user] >= order[since] and user.args[0] is member
        for member in _family(tensor)
        for user in member.users
    )


def _family(tensor: fx.Node) -> set[fx.Node]:
    """Every node that may share memory with ``tensor``, itself included."""
    family: set[fx.Node] = set()
    waiting = [tensor]
    while waiting:
        node = waiting.pop()
        if node not in family:
            family.add(node)
            waiting.extend(_source(node))
            waiting.extend(user for user in node.users if node in _source(user))
    return family


def _source(node: fx.Node) -> Iterator[fx.Node] | list[fx.Node]:
    """The tensor in whose memory the value of ``node`` may live."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    may_share = node.op == "call_module" or name in _VIEWS or node.meta.get("mutates")
    first = node.args[0] if node.args else None
    shares = may_share and isinstance(first, fx.Node) and _holds_tensor(node)
    return [first] if shares and isinstance(first, fx.Node) else []


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (TensorSpec, tuple, list)) or node.target is operator.getitem


def _order(node: fx.Node) -> dict[fx.Node, int]:
    return {other: index for index, other in enumerate(node.graph.nodes)}
