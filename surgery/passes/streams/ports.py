"""Where a block takes its state in and gives it out: found in the trace, used at every call.

A block may carry several streams side by side (the text and image tokens of Flux and SD3): the
state of the stack is all of them together.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from surgery.errors import ModelStateError

#: How to reach a value in nested tuples, lists and dicts; empty for the value itself.
Route = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Stream:
    """One tensor of the state: which argument of a block it is, and which part of its result.

    Attributes:
        position: Index among the positional arguments; None if it is only passed by name.
        name: Name of the parameter; None if it is only passed by position.
        inner: How to reach the tensor within that argument.
        result: How to reach it within the result; empty if the result is the tensor.
    """

    position: int | None
    name: str | None
    inner: Route = ()
    result: Route = ()

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The tensor among the arguments of a block; None where the stream is not passed.

        Raises:
            ModelStateError: the block was called without this argument.
        """
        if self.name is not None and self.name in kwargs:
            return at(kwargs[self.name], self.inner)
        if self.position is not None and self.position < len(args):
            return at(args[self.position], self.inner)
        raise ModelStateError(
            f"a block was called without {self}, which carries the state of its stack",
            hint="plan the rewrite again with an example that calls the model in this way",
        )

    def written(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with ``state`` in the place of the tensor."""
        if self.name is not None and self.name in kwargs:
            return args, {**kwargs, self.name: put(kwargs[self.name], self.inner, state)}
        index = cast("int", self.position)
        changed = put(args[index], self.inner, state)
        return (*args[:index], changed, *args[index + 1 :]), kwargs

    def read_result(self, result: Any) -> Tensor | None:
        """The tensor in what a block returned; None where the stream ended."""
        return at(result, self._result_path(result))

    def written_result(self, result: Any, state: Tensor) -> Any:
        """What the block returned with ``state`` in the place of the tensor."""
        return put(result, self._result_path(result), state)

    def _result_path(self, result: Any) -> Route:
        """A block may return its state alone, or with more beside it, as it is asked to."""
        if isinstance(result, Tensor):
            return ()
        if not self.result and isinstance(result, (tuple, list)):
            return (0,)
        return self.result

    def dump(self) -> list[Any]:
        """As JSON-able data."""
        return [self.position, self.name, list(self.inner), list(self.result)]

    @staticmethod
    def load(data: Sequence[Any]) -> Stream:
        """Back from ``dump``."""
        position, name, inner, result = data
        return Stream(position, name, tuple(inner), tuple(result))

    def __str__(self) -> str:
        return f"argument {self.name or self.position!r}"


def at(value: Any, path: Route) -> Tensor | None:
    """The tensor at a place within nested containers; None where the stream ended."""
    for step in path:
        if value is None:
            return None
        value = getattr(value, str(step)) if _is_fields(value, step) else value[step]
    return cast("Tensor | None", value)


def put(value: Any, path: Route, state: Tensor) -> Any:
    """``value`` with ``state`` at ``path``; containers on the way are copied, not written to."""
    if not path:
        return state
    step, rest = path[0], path[1:]
    if _is_fields(value, step):
        made = copy.copy(value)
        setattr(made, cast("str", step), put(getattr(value, cast("str", step)), rest, state))
        return made
    inner = put(value[step], rest, state)
    if not isinstance(value, tuple):
        made = copy.copy(value)
        made[step] = inner
        return made
    items = list(cast("tuple[Any, ...]", value))
    items[cast("int", step)] = inner
    kind = cast("type[Any]", type(cast("object", value)))
    if kind is tuple:  # asked first, since torch.compile cannot follow what comes next
        return tuple(items)
    named = "_fields" in vars(kind)  # the mark of a namedtuple
    return kind(*items) if named else tuple(items)


def _is_fields(value: Any, step: int | str) -> bool:
    return isinstance(step, str) and dataclasses.is_dataclass(value)
