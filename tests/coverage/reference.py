"""The formula of block shortcuts, written with hooks on a stock model.

    x_{k+1} = block_k(x_k) + Σ_{j≤k} W_kj x_j

Nothing here is the library's but the list of blocks and the matrix: what a block's state is, is
told from the tensors that one block gives out and the next one takes in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery.sources import Example
from tests.sweep.measure import Failure, still

#: How to reach a tensor in nested tuples and mappings: of (args, kwargs), or of a result.
Place = tuple[int | str, ...]
Hook = Callable[..., Any]


@dataclass(frozen=True)
class Stack:
    """Blocks that are mixed, and how.

    Attributes:
        blocks: Paths of the blocks, in the order of the rows of ``weights``.
        weights: W, (K, K).
    """

    blocks: tuple[str, ...]
    weights: Tensor


def tensors(value: Any, place: Place = ()) -> dict[Place, Tensor]:
    """The floating tensors in nested tuples, lists and mappings, by where they are."""
    if isinstance(value, Tensor):
        return {place: value} if value.is_floating_point() else {}
    if isinstance(value, Mapping):
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {}
    return {at: leaf for key, item in items for at, leaf in tensors(item, (*place, key)).items()}


def put(value: Any, place: Place, tensor: Tensor) -> Any:
    """``value`` with another tensor at a place."""
    if not place:
        return tensor
    step, rest = place[0], place[1:]
    if isinstance(value, Mapping):
        made = type(value)(value)
        made[step] = put(value[step], rest, tensor)  # type: ignore[index]
        return made
    items = [put(item, rest, tensor) if at == step else item for at, item in enumerate(value)]
    return items if isinstance(value, list) else tuple(items)


@dataclass
class _Call:
    given: dict[Place, Tensor]
    made: dict[Place, Tensor]


def streams(stock: nn.Module, example: Example, blocks: Sequence[str]) -> list[tuple[Place, Place]]:
    """Where the state of a stack is: (place in the arguments, place in the result) per tensor.

    A tensor that one block returned and the next one was given, the very same object, in the same
    two places all along. Where the model does something between two blocks, the first argument
    that has the shape of a result. What a block only hands through is no state.
    """
    calls = _watch(stock, example, blocks)
    pairs = [
        {
            (place, part)
            for place, tensor in after.given.items()
            for part, result in before.made.items()
            if tensor is result and _makes(before, place, result)
        }
        for before, after in itertools.pairwise(calls)
    ]
    common = set.intersection(*pairs) if pairs else set()
    if common:
        return sorted(common, key=str)
    handed = {id(tensor) for tensor in calls[0].given.values()}
    for place, tensor in calls[0].given.items():
        for part, result in calls[0].made.items():
            if _alike(tensor, result) and id(result) not in handed:
                return [(place, part)]
    raise Failure(f"{blocks[0]} returns nothing of the shape of an argument")


def _makes(call: _Call, place: Place, result: Tensor) -> bool:
    """Whether a result is new, and like the argument at a place."""
    handed = any(tensor is result for tensor in call.given.values())
    return not handed and place in call.given and _alike(call.given[place], result)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _watch(stock: nn.Module, example: Example, blocks: Sequence[str]) -> list[_Call]:
    """The first call of each block; of one that is in there twice, the first two."""
    calls: dict[str, list[_Call]] = {name: [] for name in blocks}

    def note(name: str) -> Hook:
        def hook(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            calls[name].append(_Call(tensors((args, kwargs)), tensors(result)))

        return hook

    handles = [
        stock.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
        for name in calls
    ]
    still(stock, example)
    for handle in handles:
        handle.remove()
    if any(len(calls[name]) < blocks.count(name) for name in blocks):
        raise Failure(f"the stock model does not call each of {blocks}")
    return [calls[name].pop(0) for name in blocks]


@contextmanager
def mixing(stock: nn.Module, example: Example, stacks: Sequence[Stack]) -> Iterator[None]:
    """Within it, ``stock`` computes the formula."""
    found = [(stack, streams(stock, example, stack.blocks)) for stack in stacks]
    handles = [
        handle for stack, ports in found for handle in _Mixing(stack, ports).attach_to(stock)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Mixing:
    """The states of one stack in one forward."""

    def __init__(self, stack: Stack, ports: list[tuple[Place, Place]]) -> None:
        self.stack = stack
        self.ports = ports
        self.states: list[dict[Place, Tensor]] = []

    def attach_to(self, stock: nn.Module) -> Iterator[Any]:
        for name in dict.fromkeys(self.stack.blocks):
            block = stock.get_submodule(name)
            yield block.register_forward_pre_hook(self._entering(name), with_kwargs=True)
            yield block.register_forward_hook(self._leave)

    def _entering(self, name: str) -> Hook:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if len(self.states) == len(self.stack.blocks):
                self.states = []
            if self.stack.blocks[len(self.states)] != name:
                raise Failure(f"{name} is called out of order")
            self.states.append(tensors((args, kwargs)))

        return hook

    def _leave(self, _: nn.Module, __: Any, result: Any) -> Any:
        row = len(self.states) - 1
        made = tensors(result)
        for place, part in self.ports:
            if part not in made:  # the last block of SD3 gives the text out no more
                continue
            mixed = made[part]
            for j in range(row + 1):
                mixed = mixed + self.stack.weights[row, j] * self.states[j][place]
            result = put(result, part, mixed)
        return result
