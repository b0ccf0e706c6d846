"""Which tensors of a graph may share memory: what an operation in place would be seen through."""

from __future__ import annotations

import operator

from torch import fx, nn

from surgery.capture import TensorSpec

# What gives a tensor that may live in the memory of its first argument. A child without weights is
# one too: an identity and a dropout hand on what they get.
_VIEWS = frozenset(
    {
        "view", "reshape", "transpose", "permute", "flatten", "unflatten", "squeeze", "unsqueeze",
        "expand", "narrow", "select", "chunk", "split", "unbind", "t", "swapaxes", "swapdims",
        "movedim", "moveaxis", "getitem", "getattr", "detach", "contiguous", "to", "view_as",
        "expand_as", "reshape_as", "unfold", "diagonal", "as_strided", "tensor_split", "float",
        "adjoint", "half", "bfloat16", "double", "type_as", "type", "dropout", "ravel", "real",
        "imag",
    }
)  # fmt: skip


def read_later(tensor: fx.Node, at: fx.Node, root: nn.Module) -> bool:
    """True if what ``at`` writes to ``tensor`` may be seen by others than the users of ``at``.

    Another view of the memory may be read after ``at``, or the memory may be the caller's.
    """
    family = _family(tensor, root)
    if any(member.op in ("placeholder", "get_attr") for member in family):
        return True
    order = _order(at)
    return any(
        order[user] > order[at]
        for member in family
        if order[member] < order[at]
        for user in member.users
    )


def written_later(tensor: fx.Node, since: fx.Node, root: nn.Module) -> bool:
    """True if something writes to the memory of ``tensor`` at ``since`` or after it."""
    order = _order(since)
    return any(
        user.meta.get("mutates") and order[user] >= order[since] and user.args[0] is member
        for member in _family(tensor, root)
        for user in member.users
    )


def _family(tensor: fx.Node, root: nn.Module) -> set[fx.Node]:
    """Every node that may share memory with ``tensor``, itself included."""
    family: set[fx.Node] = set()
    waiting = [tensor]
    while waiting:
        node = waiting.pop()
        if node not in family:
            family.add(node)
            waiting.extend(_source(node, root))
            waiting.extend(user for user in node.users if node in _source(user, root))
    return family


def _source(node: fx.Node, root: nn.Module) -> list[fx.Node]:
    """The tensor in whose memory the value of ``node`` may live; none if it has its own."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not _holds_tensor(node):
        return []
    if node.op == "call_module":
        child = root.get_submodule(str(node.target))
        shares = next(child.parameters(), None) is None
    else:
        name = node.target if isinstance(node.target, str) else _name(node.target)
        shares = name in _VIEWS or bool(node.meta.get("mutates"))
    return [first] if shares else []


def _name(target: object) -> str:
    return getattr(target, "__name__", "")


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (TensorSpec, tuple, list)) or node.target is operator.getitem


def _order(node: fx.Node) -> dict[fx.Node, int]:
    return {other: index for index, other in enumerate(node.graph.nodes)}
