"""What rewritten code calls: the history of the states of one forward, as a local value.

A loop ``for layer in self.layers: x = layer(x)`` becomes, in the code that
`surgery.capture.loops` writes::

    steps = begin(self.layers)
    for layer in self.layers:
        x = steps(layer)(x)

``steps(layer)`` calls the layer and mixes what it returns with the states that entered the
layers before it. Nothing is kept on a module, so that calls may overlap, and mixing stands
outside what a layer checkpoints.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn

from architectures.shortcuts import History
from architectures.shortcuts.project import Crossing
from surgery.capture import RELAY, private
from surgery.capture.loops import block_of
from surgery.errors import ModelStateError
from surgery.passes.streams import recorder
from surgery.passes.streams.ports import Stream
from surgery.passes.streams.segment import Segment, Segments, segments_of
from surgery.tree import children


def begin(holder: nn.Module) -> Steps:
    """The start of a forward through the blocks of ``holder``."""
    return Steps(holder)


class Steps:
    """One forward through the blocks that a module holds.

    Args:
        holder: The list, sequence or module that has the blocks as its children.
    """

    def __init__(self, holder: nn.Module) -> None:
        found = segments_of(holder)
        segments = [] if found is None else found.segments()
        self._runs = [_Run(segment, holder) for segment in segments]

    def __call__(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """What to call instead of ``layer``, which may be its bound ``forward`` as well."""
        run = self._run_of(layer)
        if run is None:
            return layer
        return functools.partial(run.step, layer, 0)

    def run(self, layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Call a layer: what captured code does instead of ``layer(*args, **kwargs)``."""
        return self(layer)(*args, **kwargs)

    def checkpointed(
        self,
        layer: nn.Module,
        use_reentrant: bool,
        preserve_rng_state: bool,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The same for a layer that ran under ``torch.utils.checkpoint`` with these options."""
        options = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}
        function = functools.partial(_recomputed, options)
        return self.through(function)(layer, *args, **kwargs)

    def through(
        self, function: Callable[..., Any], block: nn.Module | None = None
    ) -> Callable[..., Any]:
        """What to call instead of ``function(layer, ...)``, which calls the layer.

        Args:
            function: Takes the layer, or something made around it, and the layer's arguments.
            block: The layer, where that cannot be told from what ``function`` is given.
        """
        return functools.partial(self._through, function, block)

    def _through(
        self,
        function: Callable[..., Any],
        block: nn.Module | None,
        layer: Any,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run = self._run_of(layer if block is None else block)
        if run is None:
            return function(layer, *args, **kwargs)
        return run.step(function, 1, layer, *args, **kwargs)

    def sequence(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What to call instead of ``function(layers, x, ...)``, which checkpoints a sequence."""
        return functools.partial(_sequence, function, self)

    def view(self, function: Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
        """What to call instead of ``holder.children`` or ``holder.named_children``."""
        return functools.partial(_blocks_alone, function)

    def _run_of(self, target: Any) -> _Run | None:
        layer = block_of(target)
        for run in self._runs:
            if layer is not None and run.takes(layer):
                return run
        return None


class _Run:
    """The blocks of one segment, called one after the other."""

    def __init__(self, segment: Segment, holder: nn.Module) -> None:
        self._segment = segment
        self._blocks = [_inside(holder, name) for name in segment.members]
        self._histories: list[History | Crossing] = []
        self._next = 0
        self._weights = _NOTHING
        self._states: list[Tensor] = []

    def takes(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is the block that comes next; False if it is none of this run.

        Raises:
            ModelStateError: it is one, but another one should have come first.
        """
        if self._next == len(self._blocks):
            self._next = 0  # a forward may go through its blocks more than once
        if layer is self._blocks[self._next]:
            return True
        for index, block in enumerate(self._blocks):
            if block is layer:
                raise ModelStateError(
                    f"block {self._segment.members[index]!r} of a rewired stack was called where "
                    f"block {self._segment.members[self._next]!r} comes next",
                    hint="its shortcuts need the state before every block; switch off what skips "
                    "blocks (LayerDrop, early exit), or leave such blocks out with layers:",
                )
        return False

    def step(self, function: Callable[..., Any], skip: int, /, *given: Any, **kwargs: Any) -> Any:
        """Call a block and mix what it returns.

        Args:
            function: Calls the block: the block itself, or what checkpoints it.
            skip: How many of the positional arguments come before the block's own.
            given: The arguments of ``function``.
            kwargs: The same.
        """
        segment = self._segment
        if segment.counts is not None:
            return self._through_sites(function, given[:skip], given[skip:], kwargs)
        if self._next == 0:
            weights = segment()
            self._histories = [segment.history(weights) for _ in segment.streams]
        self._next += 1
        args, before = given[skip:], given[:skip]
        under_way: list[tuple[Stream, History | Crossing]] = []
        for stream, history in zip(segment.streams, self._histories, strict=True):
            state = stream.read(args, kwargs)
            if state is not None:
                args, kwargs = stream.written(args, kwargs, history.enter(state))
                under_way.append((stream, history))
        result = function(*before, *args, **kwargs)
        for stream, history in under_way:
            made = stream.read_result(result)
            if made is not None:
                mixed = history.leave(made)
                recorder.tell(made, mixed)
                result = stream.written_result(result, mixed)
        return result

    def _through_sites(
        self,
        function: Callable[..., Any],
        before: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a block whose every residual addition is a site, see `block_edit`."""
        segment = self._segment
        counts = cast("tuple[int, ...]", segment.counts)
        if self._next == 0:
            self._weights, self._states = segment(), []
        first = len(self._states)
        last = first + counts[self._next]
        self._next += 1
        rows = self._weights[first:last]
        # A topology that also weighs what an addition adds up has one more column for that.
        coefficients = torch.cat([rows[:, :last], rows[:, sum(counts) :]], dim=1)
        made = function(*before, *args, RELAY, coefficients, *self._states, **kwargs)
        result = made[0]
        self._states.extend(made[1:])
        # Hooks on the block saw the states behind its result.
        recorder.tell(result, segment.streams[0].read_result(result))
        return result


def _inside(holder: nn.Module, name: str) -> nn.Module:
    for part in name.split("."):
        holder = children(holder)[part]
    return holder


def _recomputed(options: dict[str, bool], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # By position, since a re-entrant checkpoint sees no other arguments.
    names = tuple(kwargs)
    return private.CHECKPOINT(_called, layer, names, *args, *kwargs.values(), **options)


def _called(layer: nn.Module, names: tuple[str, ...], *values: Any) -> Any:
    count = len(values) - len(names)
    return layer(*values[:count], **dict(zip(names, values[count:], strict=True)))


def _sequence(
    function: Callable[..., Any], steps: Steps, layers: Iterable[Any], *args: Any, **kwargs: Any
) -> Any:
    """``function(layers, ...)``, which checkpoints a sequence, with each layer by itself.

    The original may checkpoint several layers as one; what is computed is the same.
    """
    if function is _SEQUENTIAL:
        bound = inspect.signature(function).bind(layers, *args, **kwargs)
        options = dict(bound.kwargs)
        one = functools.partial(_checkpoint, options)
        return _one_by_one(one, [(steps, layers)], bound.arguments["input"], skip_last=True)
    bound = inspect.signature(function).bind(layers, *args, **kwargs)
    options = dict(bound.arguments)
    state = options.pop("x")
    del options["functions"]
    options.pop("every", None)
    skip_last = bool(options.pop("skip_last", False))
    groups = [(steps, layers)]
    if options.pop("flatten", False):
        groups = [(begin(part), cast("Iterable[Any]", part)) for part in layers]
    one = functools.partial(_checkpoint_seq, function, options)
    return _one_by_one(one, groups, state, skip_last=skip_last)


def _blocks_alone(function: Callable[[], Iterable[Any]]) -> Iterable[Any]:
    """Children, named or not, without the coefficients that are among them."""
    found: list[Any] = []
    for item in function():
        named = isinstance(item, tuple)
        if not isinstance(item[1] if named else item, Segments):
            found.append(item)
    return found


def _one_by_one(
    one: Callable[..., Any],
    groups: Iterable[tuple[Steps, Iterable[nn.Module]]],
    state: Any,
    *,
    skip_last: bool,
) -> Any:
    layers = [(steps, layer) for steps, members in groups for layer in members]
    for index, (steps, layer) in enumerate(layers):
        last = skip_last and index == len(layers) - 1
        state = steps(layer)(state) if last else steps.through(one)(layer, state)
    return state


def _checkpoint_seq(
    function: Callable[..., Any],
    options: dict[str, Any],
    layer: nn.Module,
    state: Any,
    *states: Any,
) -> Any:
    if not states:
        return function([layer], state, **options)
    # The helper hands on one tensor, but a re-entrant checkpoint must be given every state.
    reentrant = _is_reentrant(function, options)
    return private.CHECKPOINT(layer, state, *states, use_reentrant=reentrant)


def _is_reentrant(function: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether a helper checkpoints re-entrantly, which runs its functions without gradients."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    recorded: list[bool] = []

    def observe(state: Any) -> Any:
        recorded.append(torch.is_grad_enabled())
        return state

    function([observe], torch.zeros(1, requires_grad=True), **options)
    return not recorded[0]


def _checkpoint(options: dict[str, Any], layer: nn.Module, *states: Any) -> Any:
    return private.CHECKPOINT(layer, *states, **options)


_NOTHING = torch.empty(0)
_SEQUENTIAL = cast("Callable[..., Any]", torch_checkpoint.checkpoint_sequential)  # pyright: ignore[reportUnknownMemberType]
