"""A block whose residual additions mix in the states of earlier ones.

Every residual addition of a block is a site, and what is added to its branch, the shortcut, is the
state of that site. The block's captured forward gets the earlier states as extra inputs, mixes at
each site, and returns the states of its own sites behind its result::

    def forward(self, x, coefficients, *states):
        attn = self.attn(self.norm1(x))
        mixed = add_states(x + attn, coefficients, 0, states, (x,))
        mlp = self.mlp(self.norm2(mixed))
        mixed_1 = add_states(mixed + mlp, coefficients, 1, states, (x, mixed))
        return (mixed_1, x, mixed)
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from architectures.shortcuts import weighted_sum
from surgery.capture import Capture
from surgery.errors import CaptureError
from surgery.passes.streams.aliases import read_later, written_later
from surgery.residuals import Residual, find_residuals

Mode = Literal["add", "replace"]


@dataclass(frozen=True)
class BlockEdit:
    """Rewires the residual additions of a captured block; the ``edit`` of ``forward_mixin``.

    Extra inputs of the edited forward: for each stream a tensor ``(sites, n + sites)`` of
    coefficients, a row per site of the block, a column per earlier state and then per site; after
    those the earlier states of the first stream, of the second, and so on. It returns the result
    and the states of its own sites, in the order they run.

    Attributes:
        mode: ``add``: ``shortcut + branch + sum_j W_sj state_j``; ``replace``:
            ``branch + sum_j W_sj state_j``.
        owners: The module that performs each residual addition of the block, relative to it, in
            the order they run.
        streams: The stream of each of them, counted from 0; None for one that is left alone.
        scaled: The coefficients have one more column, the weight of what the sites add up without
            the states.
    """

    mode: Mode
    owners: tuple[str, ...]
    streams: tuple[int | None, ...]
    scaled: bool = False

    @property
    def sites(self) -> tuple[int, ...]:
        """The stream of each site, in the order of the states that are returned."""
        return tuple(stream for stream in self.streams if stream is not None)

    def __call__(self, made: Capture, module: nn.Module) -> Capture:
        """The capture with its residual additions rewired.

        Raises:
            CaptureError: this path through the forward has other residual additions than the edit
                was planned for; or one of them cannot be rewired.
        """
        found = find_residuals(made.graph, module)
        owners = tuple(residual.owner for residual in found)
        if owners != self.owners:
            raise CaptureError(
                f"{made.kind}: this call has residual additions in {_listed(owners)}, where the "
                f"plan has them in {_listed(self.owners)}",
                hint="plan the rewrite with an example that calls the block as it is called now",
            )
        return _Rewiring(self, made, found, module).done()


def plan_block(
    made: Capture, found: Sequence[Residual], *, mode: Mode, scaled: bool = False
) -> BlockEdit:
    """The edit that makes every residual addition of a captured block a site.

    Additions that follow one another are sites of one stream; a block with several inputs side by
    side (image and text tokens) has several streams.

    Args:
        made: The block's capture, with what performs its additions inlined (`owners_inlined`).
        found: The residual additions of its graph.
        mode: See `BlockEdit`.
        scaled: See `BlockEdit`.

    Raises:
        CaptureError: the block has no residual addition.
    """
    if not found:
        raise CaptureError(f"{made.kind}: no residual addition in its own forward")
    owners = tuple(residual.owner for residual in found)
    return BlockEdit(mode, owners, tuple(_streams(found)), scaled)


def owners_inlined(block: str, residuals: Sequence[Residual]) -> tuple[str, ...]:
    """The children of a block to inline, so that all its residual additions are in its graph.

    Args:
        block: Dotted path of the block.
        residuals: Of the whole model's trace.
    """
    inner = {r.owner[len(block) + 1 :] for r in residuals if r.owner.startswith(f"{block}.")}
    closed = {
        ".".join(path.split(".")[: n + 1]) for path in inner for n in range(path.count(".") + 1)
    }
    return tuple(sorted(closed))


def _streams(found: Sequence[Residual]) -> list[int]:
    stream_of: dict[fx.Node, int] = {}
    streams: list[int] = []
    starts: dict[fx.Node, int] = {}
    for residual in found:
        before = residual.follows
        if before is None or before not in stream_of or not residual.continues:
            stream = starts.setdefault(residual.source, len(starts))
        else:
            stream = stream_of[before]
        stream_of[residual.node] = stream
        streams.append(stream)
    return streams


def _listed(owners: Sequence[str]) -> str:
    return f"[{', '.join(owner or 'the block' for owner in owners)}]"


# -- what the generated code calls ---------------------------------------------------------------


def add_states(
    total: Tensor,
    coefficients: Tensor,
    site: int,
    states: Sequence[Tensor],
    own: Sequence[Tensor],
) -> Tensor:
    """``total + sum_j coefficients[site, j] state_j``, in the dtype of ``total``.

    Args:
        total: What the site adds up, any shape.
        coefficients: ``(sites, n)``, with at least as many columns as there are states.
        site: Row of the site.
        states: Of the sites in earlier blocks.
        own: Of the sites in this block so far.
    """
    row, used = _used(total, coefficients, site, states, own)
    return weighted_sum(total, row, used).to(total.dtype)


def replace_shortcut(
    branch: Tensor,
    coefficients: Tensor,
    site: int,
    states: Sequence[Tensor],
    own: Sequence[Tensor],
) -> Tensor:
    """``branch + sum_j coefficients[site, j] state_j``; ``own`` ends with the shortcut.

    The dtype is that of ``branch + shortcut``; see `add_states`.
    """
    row, used = _used(branch, coefficients, site, states, own)
    return weighted_sum(branch, row, used).to(torch.promote_types(branch.dtype, own[-1].dtype))


def mixture(
    coefficients: Tensor, site: int, states: Sequence[Tensor], own: Sequence[Tensor]
) -> Tensor:
    """``sum_j coefficients[site, j] state_j`` instead of the shortcut, which ``own`` ends with."""
    shortcut = own[-1]
    row, used = _used(shortcut, coefficients, site, states, own)
    return weighted_sum(torch.zeros_like(shortcut), row, used).to(shortcut.dtype)


def scaled(
    total: Tensor, coefficients: Tensor, site: int, states: Sequence[Tensor], own: Sequence[Tensor]
) -> Tensor:
    """``coefficients[site, -1] total + sum_j coefficients[site, j] state_j``."""
    row, used = _used(total, coefficients, site, states, own)
    weight = coefficients[site, -1:] - 1  # what is missing to the weight that a base has
    return weighted_sum(total, torch.cat([weight, row]), (total, *used)).to(total.dtype)


def _used(
    like: Tensor,
    coefficients: Tensor,
    site: int,
    states: Sequence[Tensor],
    own: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The coefficients of a site and what they belong to, in the shape of its sum.

    A block may flatten its state between two sites.
    """
    used = [state.reshape(like.shape) for state in (*states, *own)]
    return coefficients[site, : len(used)], used


def states_of(
    stream: int, coefficients: Sequence[Tensor], states: Sequence[Tensor], *, scaled: bool
) -> tuple[Tensor, ...]:
    """The earlier states of one stream, out of those of all of them.

    Args:
        stream: Which one.
        coefficients: Of each stream; the columns beyond one per site say how many states it has.
        states: Of all streams, one after the other.
        scaled: Whether the last column is no state's.
    """
    counts = [rows.shape[1] - rows.shape[0] - int(scaled) for rows in coefficients]
    start = sum(counts[:stream])
    return tuple(states[start : start + counts[stream]])


# -- the graph -----------------------------------------------------------------------------------


class _Rewiring:
    """One edit of one graph, under way."""

    def __init__(
        self, edit: BlockEdit, made: Capture, found: Sequence[Residual], root: nn.Module
    ) -> None:
        self._edit = edit
        self._root = root
        self._made = made
        self._graph = copy.deepcopy(made.graph)
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._sites = [
            (residual, stream)
            for residual, stream in zip(found, edit.streams, strict=True)
            if stream is not None
        ]
        self._count = max(edit.sites) + 1
        self._own: list[list[fx.Node]] = [[] for _ in range(self._count)]
        self._new: list[fx.Node] = []

    def done(self) -> Capture:
        """The rewired capture."""
        extra = self._add_inputs()
        for residual, stream in self._sites:
            self._rewire(residual, stream)
        output = self._graph.output_node()
        output.args = ((output.args[0], *self._new),)
        return self._made.rewritten(self._graph, self._root, extra)

    def _add_inputs(self) -> tuple[str, ...]:
        names = [
            f"coefficients_{i}" if self._count > 1 else "coefficients" for i in range(self._count)
        ]
        last = [node for node in self._graph.nodes if node.op == "placeholder"][-1]
        self._meta = {"owner": "", "where": last.meta["where"], "context": (), "checkpoint": None}
        self._rows: list[fx.Node] = []
        for name in names:
            last = self._after(last, ("placeholder", name, (), {}), name)
            self._rows.append(last)
        all_states = self._after(last, ("placeholder", "*states", (), {}), "states")
        if self._count == 1:
            self._states: list[fx.Node] = [all_states]
            return ("coefficients", "*states")
        self._states = []
        last = all_states
        for stream in range(self._count):
            args = (stream, tuple(self._rows), all_states)
            call = ("call_function", states_of, args, {"scaled": self._edit.scaled})
            last = self._after(last, call, f"states_{stream}")
            self._states.append(last)
        return (*names, "*states")

    def _after(self, place: fx.Node, what: tuple[Any, ...], name: str) -> fx.Node:
        with self._graph.inserting_after(place):
            node = self._graph.create_node(*what, name=name)
        node.meta.update(self._meta, val=None)
        return node

    def _rewire(self, residual: Residual, stream: int) -> None:
        node, entry = self._nodes[residual.node.name], self._nodes[residual.entry.name]
        position = residual.entry.all_input_nodes.index(residual.shortcut)
        shortcut = entry.all_input_nodes[position]
        self._meta = {key: node.meta[key] for key in ("owner", "where", "context", "checkpoint")}
        entry, state = self._kept(entry, shortcut)
        node = entry if residual.entry is residual.node else node
        own = self._own[stream]
        own.append(state)
        self._new.append(state)
        mixing = (self._rows[stream], len(own) - 1, self._states[stream], tuple(own))
        if self._edit.mode == "add":
            self._put(node, scaled if self._edit.scaled else add_states, (node, *mixing))
        elif node is entry and not self._edit.scaled and self._is_plain_sum(entry, shortcut):
            self._replace(entry, shortcut, mixing)
        else:
            self._substitute(node, entry, shortcut, mixing)

    def _kept(self, entry: fx.Node, shortcut: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The addition, and the shortcut as a state that nothing changes any more."""
        onto_shortcut = entry.meta.get("mutates") and entry.args[0] is shortcut
        if onto_shortcut and not read_later(shortcut, entry, self._root):
            entry = self._out_of_place(entry)
        if not written_later(shortcut, entry, self._root):
            return entry, shortcut
        with self._graph.inserting_before(entry):
            state = self._graph.call_method("clone", (shortcut,))
        state.meta.update(self._meta, val=shortcut.meta["val"])
        return entry, state

    def _out_of_place(self, entry: fx.Node) -> fx.Node:
        """``x.add_(y)``, whose target nobody reads again, as ``x + y``."""
        made = self._beside(entry, entry.args)
        self._graph.erase_node(entry)
        return made

    def _beside(self, entry: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """An addition out of place, of which everything takes the sum that took it of ``entry``."""
        plain: Callable[..., Any] = torch.add if entry.kwargs else operator.add
        with self._graph.inserting_before(entry):
            made = self._graph.call_function(plain, args, entry.kwargs)
        made.meta.update({key: value for key, value in entry.meta.items() if key not in _WRITING})
        entry.replace_all_uses_with(made)
        return made

    def _is_plain_sum(self, entry: fx.Node, shortcut: fx.Node) -> bool:
        """True for ``a + b`` in whatever form, if nothing is lost where it is left out."""
        binary = entry.target in _SUMS and len(entry.args) == 2 and not entry.kwargs
        if not binary or len(entry.all_input_nodes) != 2:
            return False
        branch = next(node for node in entry.all_input_nodes if node is not shortcut)
        if entry.meta["val"].shape != branch.meta["val"].shape:
            return False
        if not entry.meta.get("mutates"):
            return True
        return entry.args[0] is branch and not read_later(branch, entry, self._root)

    def _replace(self, entry: fx.Node, shortcut: fx.Node, mixing: tuple[Any, ...]) -> None:
        branch = next(node for node in entry.all_input_nodes if node is not shortcut)
        self._put(entry, replace_shortcut, (branch, *mixing))
        self._graph.erase_node(entry)

    def _substitute(
        self, node: fx.Node, entry: fx.Node, shortcut: fx.Node, mixing: tuple[Any, ...]
    ) -> None:
        """Let the addition add the mixture where it added the shortcut."""
        if self._edit.scaled:
            raise CaptureError(
                f"{self._made.kind}: {node.meta['where']}: an addition of several branches cannot "
                "have its sum scaled and its shortcut replaced",
                hint="use mode: add",
            )
        with self._graph.inserting_before(entry):
            mixed = self._graph.call_function(mixture, mixing)
        mixed.meta.update(self._meta, val=shortcut.meta["val"])
        if entry.meta.get("mutates") and entry.args[0] is shortcut:
            # Others see what the original writes there; the sum is made beside it.
            self._beside(entry, (mixed, *entry.args[1:]))
        else:
            entry.replace_input_with(shortcut, mixed)

    def _put(self, node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Let everything that used ``node`` use ``function(*args)``."""
        with self._graph.inserting_after(node):
            mixed = self._graph.create_node("call_function", function, args, name="mixed")
        mixed.meta.update(self._meta, val=node.meta["val"])
        node.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)


_WRITING = frozenset({"mutates", "written_by"})
_SUMS = frozenset({operator.add, torch.add, "add", "add_"})
