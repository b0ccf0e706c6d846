"""From a graph to its residual additions."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

from torch import fx, nn

from surgery.capture import TensorSpec
from surgery.capture.nodes import op_name, spec
from surgery.residuals.flow import Flow, sweep_back
from surgery.residuals.ops import Effect
from surgery.residuals.regions import Region, Regions
from surgery.residuals.residual import Kind, Residual

_UNRELATED = "neither term is computed from the other"
_STRENGTH: tuple[Kind, ...] = ("identity", "cast", "scaled", "pooled", "projection")
_KINDS: dict[Effect, Kind] = {
    Effect.LAYOUT: "identity",
    Effect.PART: "identity",
    Effect.DROP: "identity",
    Effect.CAST: "cast",
    Effect.SCALE: "scaled",
    Effect.POOL: "pooled",
    Effect.REDUCE: "pooled",
    Effect.STRIDE: "pooled",
    Effect.NORM: "projection",
    Effect.ACTIVATION: "projection",
    Effect.WEIGHT: "projection",
}
_ELEMENTWISE = frozenset({Effect.SCALE, Effect.ADD, Effect.SUBTRACT})
_PARTS = frozenset({Effect.PART, Effect.STRIDE})
_WORK = frozenset({Effect.WEIGHT, Effect.MIX, Effect.POOL})
_LINEAR = frozenset(
    {
        *(
            Effect.LAYOUT,
            Effect.PART,
            Effect.STRIDE,
            Effect.DROP,
            Effect.CAST,
            Effect.WEIGHT,
            Effect.ADD,
        ),
        *(Effect.JOIN, Effect.NORM),
    }
)
_MOST_WEIGHTS = 2  # a separable convolution
_RESHAPES = frozenset(
    ["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"]
)
"""Layouts that keep the order of the elements."""


@dataclass(frozen=True)
class NoResidual:
    """An addition that is none.

    Attributes:
        node: The addition.
        reason: Why, as a clause about it.
        near: Whether its terms have to do with each other: one is computed from the other, or both
            from a third.
        owner: Dotted path of the module whose forward performs it.
        where: ``file:line``.
    """

    node: fx.Node
    reason: str
    near: bool
    owner: str
    where: str

    def __str__(self) -> str:
        return f"{self.owner or '(the model)'}: {self.reason}, {self.where}"


@dataclass(frozen=True)
class Findings:
    """Every addition of a graph that depends on its inputs.

    Attributes:
        residuals: Those that are residual, in the order they run.
        others: Those that are not, in the order they run, with the reason.
    """

    residuals: tuple[Residual, ...]
    others: tuple[NoResidual, ...]

    @property
    def near(self) -> tuple[NoResidual, ...]:
        """Of the others, those that came close."""
        return tuple(other for other in self.others if other.near)


def find_residuals(graph: fx.Graph, root: nn.Module) -> tuple[Residual, ...]:
    """The residual additions of a graph, in the order they run.

    Args:
        graph: From ``trace_model(root, ...)`` or ``capture(root, ...)`` of `surgery.capture`.
        root: The module that was traced.
    """
    return examine(graph, root).residuals


def examine(graph: fx.Graph, root: nn.Module) -> Findings:
    """The residual additions of a graph, and why the others are none.

    Args:
        graph: From ``trace_model(root, ...)`` or ``capture(root, ...)`` of `surgery.capture`.
        root: The module that was traced.
    """
    search = _Search(graph, root)
    return search.findings()


@dataclass(frozen=True)
class _Step:
    """A tensor on the way of a shortcut, from the addition backwards.

    Attributes:
        node: The tensor.
        kind: What lies between it and the addition.
        weights: How many weight layers do.
        bent: Whether a nonlinearity does, beyond which no weight layer may.
        parts: The tensors that it is only a part of, further back than ``node``.
    """

    node: fx.Node
    kind: Kind
    weights: int
    bent: bool
    parts: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Candidate:
    residual: Residual
    region: Region


class _Search:
    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.flow = Flow(graph, root)
        self.regions = Regions(graph)
        self._nodes = list(graph.nodes)
        self.found: dict[fx.Node, _Candidate] = {}
        self.refused: dict[fx.Node, tuple[str, bool]] = {}
        adds = [node for node in graph.nodes if self._is_sum(node)]
        self._ways = {term: self._way(term) for node in adds for term in self.flow.terms(node)[:2]}
        self._number_sources()
        self._reach = self._reached()
        for node in adds:
            self._consider(node)
        self._keep_main_stream()
        self._link()

    def findings(self) -> Findings:
        residuals = tuple(candidate.residual for candidate in self.found.values())
        others = tuple(
            NoResidual(node, reason, near, *_place(node))
            for node, (reason, near) in self.refused.items()
        )
        order = self.flow.order
        return Findings(
            tuple(sorted(residuals, key=lambda each: order[each.node])),
            tuple(sorted(others, key=lambda each: order[each.node])),
        )

    # -- which terms are computed from which ------------------------------------------------

    def _is_sum(self, node: fx.Node) -> bool:
        flow = self.flow
        single = spec(node) is not None and len(flow.terms(node)) > 1
        return single and flow.is_live(node) and flow.is_float(node)

    def _way(self, term: fx.Node) -> tuple[_Step, ...]:
        """What a term may have been before, nearest first, through at most one weight layer."""
        steps = [_Step(term, "identity", 0, False, ())]
        while (step := self._before(steps[-1])) is not None:
            steps.append(step)
        return tuple(steps)

    def _before(self, step: _Step) -> _Step | None:
        flow, node = self.flow, step.node
        effect = flow.effect[node]
        if effect not in _KINDS:
            return None
        live = flow.live_reads(node)
        if len(live) != 1:
            return None
        weights = step.weights + flow.weights.get(node, 0)
        bends = self._bends(node)
        if weights > _MOST_WEIGHTS or (step.bent and weights > step.weights):
            return None
        if bends and not weights:
            return None
        kinds: tuple[Kind, ...] = (step.kind, _KINDS[effect])
        kind = max(kinds, key=_STRENGTH.index)
        parts = (*step.parts, live[0]) if effect in _PARTS else step.parts
        return _Step(live[0], kind, weights, step.bent or bends, parts)

    def _bends(self, node: fx.Node) -> bool:
        """Whether it is, or has in it, a nonlinearity; normalisation counts as none."""
        effect = self.flow.effect[node]
        return effect is Effect.ACTIVATION or (effect is Effect.NORM and self.flow.has_more(node))

    def _number_sources(self) -> None:
        sources = dict.fromkeys(step.node for way in self._ways.values() for step in way)
        self._bit = {node: 1 << at for at, node in enumerate(sources)}

    def _reached(self) -> dict[fx.Node, int]:
        """For each tensor the sources it is computed from, itself included, as a bit set."""
        reach: dict[fx.Node, int] = {}
        for node in self.flow.graph.nodes:
            found = self._bit.get(node, 0)
            if self.flow.is_float(node) and self.flow.effect[node] is not Effect.LOOKUP:
                for each in self.flow.reads[node]:
                    found |= reach.get(each, 0)
            reach[node] = found
        return reach

    def _leads_to(self, source: fx.Node, node: fx.Node) -> bool:
        return bool(self._reach[node] & self._bit[source])

    # -- one addition ----------------------------------------------------------------------

    def _consider(self, node: fx.Node) -> None:
        terms = self.flow.terms(node)
        one, other = terms[0], terms[1]
        if one is other:
            self.refused[node] = ("a tensor is added to itself", False)
            return
        shapes = [_shape(each) for each in (one, other, node)]
        if len(set(shapes)) > 1:
            self.refused[node] = (f"one term is broadcast: {shapes[0]} + {shapes[1]}", False)
            return
        reasons: list[str] = []
        for shortcut, branch, step in self._readings(one, other):
            found = self._judge(node, shortcut, branch, step)
            if isinstance(found, _Candidate):
                self.found[node] = found
                return
            reasons.append(found)
        if self._extends(node, one, other) or self._extends(node, other, one):
            return
        self.refused[node] = (reasons[0] if reasons else _UNRELATED, bool(reasons))

    def _readings(self, one: fx.Node, other: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, _Step]]:
        """Each term as the shortcut of the other, the plainest reading first.

        Its source is the nearest tensor that both have in common: what a projection computes on its
        way is its own.
        """
        readings: list[tuple[fx.Node, fx.Node, _Step]] = []
        for shortcut, branch in ((one, other), (other, one)):
            steps = (step for step in self._ways[shortcut] if self._leads_to(step.node, branch))
            readings.extend((shortcut, branch, step) for step in islice(steps, 1))
        return iter(sorted(readings, key=lambda reading: reading[2].weights))

    def _judge(
        self, node: fx.Node, shortcut: fx.Node, branch: fx.Node, step: _Step
    ) -> _Candidate | str:
        source = step.node
        inner = self._between(source, branch)
        if not any(self.flow.effect[each] in _WORK or self._is_opaque(each) for each in inner):
            return "no weight layer, attention or pooling lies between its terms"
        if self._sees_other_part(step, inner):
            return "its terms are computed from different parts of a tensor"
        first = min(self.flow.order[each] for each in inner)
        region = self.regions.around(node, first)
        if step.kind == "projection":
            reason = self._why_no_projection(node, step, inner, region)
            if reason is not None:
                return reason
        found = cast(TensorSpec, spec(node))  # or it would be no sum
        owner, where = _place(node)
        residual = Residual(
            node=node,
            entry=node,
            shortcut=shortcut,
            source=source,
            branches=tuple(self._parallel(branch, source, owner)),
            kind=self._kind(node, shortcut, step),
            shape=tuple(found.shape),
            dtype=found.dtype,
            owner=owner,
            block=region.path,
            where=where,
            in_place=bool(node.meta.get("mutates")),
        )
        return _Candidate(residual, region)

    def _kind(self, node: fx.Node, shortcut: fx.Node, step: _Step) -> Kind:
        """With ``torch.add(x, y, alpha=...)`` in mind, which scales ``y``."""
        alpha = node.kwargs.get("alpha", 1)
        scales = alpha != 1 and self.flow.terms(node)[1] is shortcut
        kinds: tuple[Kind, ...] = (step.kind, "scaled") if scales else (step.kind,)
        return max(kinds, key=_STRENGTH.index)

    def _between(self, source: fx.Node, branch: fx.Node) -> set[fx.Node]:
        """The tensors by way of which ``branch`` is computed from ``source``."""
        return sweep_back(
            self.flow,
            [branch],
            lambda node: node is not source and self._leads_to(source, node),
        )

    def _is_opaque(self, node: fx.Node) -> bool:
        """A module that is shown as one node and of which nothing is known."""
        return node.op == "call_module" and self.flow.effect[node] is Effect.OTHER

    def _sees_other_part(self, step: _Step, inner: set[fx.Node]) -> bool:
        """Whether the branch takes only parts of what the shortcut is a part of."""
        for whole in step.parts:
            users = [each for each in self.flow.users[whole] if each in inner]
            if users and all(self.flow.effect[each] in _PARTS for each in users):
                return True
        return False

    def _why_no_projection(
        self, node: fx.Node, step: _Step, inner: set[fx.Node], region: Region
    ) -> str | None:
        if region.path != str(node.meta.get("owner", "")):
            return "a projection is added whose source lies outside of the module that adds"
        if self._depth(inner) <= step.weights:
            return "it adds up parallel branches, of which none is a projection of what they share"
        if step.weights and all(self._is_linear(each) for each in inner):
            return "it adds up linear maps of one tensor"
        return None

    def _depth(self, inner: set[fx.Node]) -> int:
        """Most weight layers on a path through some tensors."""
        depth: dict[fx.Node, int] = {}
        for node in sorted(inner, key=self.flow.order.__getitem__):
            before = max((depth.get(each, 0) for each in self.flow.reads[node]), default=0)
            depth[node] = before + self.flow.weights.get(node, 0)
        return max(depth.values())

    def _is_linear(self, node: fx.Node) -> bool:
        flow = self.flow
        if self._bends(node) or flow.weights.get(node, 0) > 1:
            return False
        if flow.effect[node] is Effect.SCALE:
            return len(flow.live_reads(node)) == 1
        return flow.effect[node] in _LINEAR

    def _parallel(self, branch: fx.Node, source: fx.Node, owner: str) -> Iterator[fx.Node]:
        """The branches that were added up to one, if each is computed from the source."""
        plain = branch
        while self.flow.effect[plain] in (Effect.DROP, Effect.CAST) and self._is_only_read(plain):
            plain = self.flow.reads[plain][0]
        terms = self.flow.terms(plain) if plain not in self.found else ()
        same = len(terms) == 2 and _place(plain)[0] == owner
        if same and all(self._leads_to(source, each) for each in terms):
            self.refused.pop(plain, None)
            for each in terms:
                yield from self._parallel(each, source, owner)
        else:
            yield branch

    def _is_only_read(self, node: fx.Node) -> bool:
        return len(self.flow.users[node]) == 1

    def _extends(self, node: fx.Node, before: fx.Node, more: fx.Node) -> bool:
        """Add a parallel branch to the residual whose sum is a term of ``node``."""
        candidate = self.found.get(before)
        if candidate is None or not self._is_only_read(before):
            return False
        known = candidate.residual
        if known.source not in self._bit or not self._leads_to(known.source, more):
            return False
        inner = self._between(known.source, more)
        if not any(self.flow.effect[each] in _WORK or self._is_opaque(each) for each in inner):
            return False
        first = min(self.flow.order[each] for each in inner)
        region = self.regions.around(node, min(first, candidate.region.start))
        del self.found[before]
        owner, where = _place(node)
        self.found[node] = _Candidate(
            replace(
                known,
                node=node,
                branches=(*known.branches, *self._parallel(more, known.source, owner)),
                owner=owner,
                where=where,
                block=region.path,
                in_place=known.in_place or bool(node.meta.get("mutates")),
            ),
            region,
        )
        return True

    # -- the main stream --------------------------------------------------------------------

    def _keep_main_stream(self) -> None:
        streams: dict[Region, set[fx.Node]] = {}
        for node, candidate in list(self.found.items()):
            region = candidate.region
            if region not in streams:
                streams[region] = self._stream(region)
            if node not in streams[region]:
                self.refused[node] = ("it is not on the main stream of the call it lies in", True)
        for node in self.refused:
            self.found.pop(node, None)

    def _stream(self, region: Region) -> set[fx.Node]:
        """What all of a result of a call depends on, along shortcuts.

        A result is what is read after the call, or not at all: a last block may give more than the
        model takes.
        """
        end = self.regions.end[region]
        order, users = self.flow.order, self.flow.users
        results = [
            node
            for node in self._nodes[region.start : end + 1]
            if self.flow.is_live(node)
            and (
                not users[node]
                or any(order[user] > end or user.op == "output" for user in users[node])
            )
        ]
        found: set[fx.Node] = set()
        seen: set[tuple[fx.Node, int]] = set()
        waiting = [(result, region.start) for result in results]
        while waiting:
            start = waiting.pop()
            if start not in seen:
                seen.add(start)
                waiting.extend(self._walk(*start, found))
        return found

    def _walk(
        self, result: fx.Node, floor: int, found: set[fx.Node]
    ) -> Iterator[tuple[fx.Node, int]]:
        """Go back from a result; yields further results to start from, each with its floor."""
        order = self.flow.order
        opened = {result}
        heap = [(-order[result], result.name, result)]
        while heap:
            node = heapq.heappop(heap)[2]
            if len(opened) == 1:
                found.add(node)
                yield from self._side_walks(node, floor)
            opened.remove(node)
            for each in self._carriers(node):
                if each not in opened and self.flow.is_live(each):
                    opened.add(each)
                    if order[each] >= floor:
                        heapq.heappush(heap, (-order[each], each.name, each))

    def _side_walks(self, node: fx.Node, floor: int) -> Iterator[tuple[fx.Node, int]]:
        if node in self.found:
            residual = self.found[node].residual
            for branch in residual.branches:
                yield branch, max(floor, self.flow.order[residual.source] + 1)
        elif self.flow.effect[node] is Effect.JOIN:
            for each in self.flow.live_reads(node):
                yield each, floor

    def _carriers(self, node: fx.Node) -> Iterable[fx.Node]:
        """What the stream came by: the shortcut of a residual, the larger factor of a product."""
        if node in self.found:
            return (self.found[node].residual.shortcut,)
        live = self.flow.live_reads(node)
        if self.flow.effect[node] in _ELEMENTWISE:
            whole = [each for each in live if self.flow.numel(each) >= self.flow.numel(node)]
            return whole or live
        return live

    # -- what follows what ------------------------------------------------------------------

    def _link(self) -> None:
        for node, candidate in list(self.found.items()):
            before, kept = self._residual_before(candidate.residual)
            linked = replace(candidate.residual, follows=before, continues=kept)
            self.found[node] = replace(candidate, residual=linked)

    def _residual_before(self, residual: Residual) -> tuple[fx.Node | None, bool]:
        """The addition that the source comes from, and whether the state kept its shape since."""
        flow, node = self.flow, residual.source
        size, resized, moved = flow.numel(residual.node), False, False
        while node not in self.found:
            live = [each for each in self._carriers(node) if flow.is_live(each)]
            if flow.effect[node] is Effect.JOIN:
                live = list(dict.fromkeys(map(self._whole, live)))
            if len(live) != 1:
                return None, False
            if flow.effect[node] is Effect.LAYOUT:
                moved = moved or op_name(node) not in _RESHAPES  # padding is undone by a crop
            elif flow.effect[node] not in _PARTS:
                resized = resized or flow.numel(node) != size
            node = live[0]
        same = _shape(node) == residual.shape
        return node, not resized and flow.numel(node) == size and (same or not moved)

    def _whole(self, node: fx.Node) -> fx.Node:
        """What a tensor is a part of."""
        while self.flow.effect[node] in (Effect.PART, Effect.LAYOUT):
            node = self.flow.reads[node][0]
        return node


def _place(node: fx.Node) -> tuple[str, str]:
    return str(node.meta.get("owner", "")), str(node.meta.get("where", ""))


def _shape(node: fx.Node) -> tuple[int, ...]:
    found = spec(node)
    return () if found is None else tuple(found.shape)
