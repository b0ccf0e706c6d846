"""Stacks that turn out to be no more than a list of stages, and the stacks inside those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from surgery.passes.streams.runs import find_runs
from surgery.select import ModelMap, Stack


def with_a_state(stacks: Iterable[Stack], sites: ModelMap) -> Iterator[Stack]:
    """The stacks through which a state flows; for a list of stages, the stacks inside them.

    Stacks are told from the module tree, where two stages of one width can look like two blocks.
    Only the trace shows that the second is given a state of another shape.
    """
    for stack in stacks:
        if _flows(stack, sites):
            yield stack
            continue
        inside = [each for each in sites.all_stacks if _is_inside(each, [stack])]
        flowing = [each for each in inside if _flows(each, sites)]
        outermost = [each for each in flowing if not _is_inside(each, flowing)]
        yield from outermost or (stack,)


def _flows(stack: Stack, sites: ModelMap) -> bool:
    return bool(find_runs(sites.trace, stack.layers, sites.model).found)


def _is_inside(stack: Stack, others: Iterable[Stack]) -> bool:
    layers = (layer for other in others for layer in other.layers)
    return any(f"{stack.path}.".startswith(f"{layer}.") for layer in layers)
