"""A captured forward that meets calls it was not captured for.

A `Forward` holds the variants of one module's forward, each a `Capture`. A call takes the first
variant that accepts it. When none does, the forward is captured again for that call, up to a
limit; it is never run unedited. When a guard fails halfway (a child returned something else, the
data took another branch), the variant that goes the right way from there takes over with the
values computed so far, so that nothing runs twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from surgery.capture import private
from surgery.capture.codegen import Miss
from surgery.capture.guards import Guard
from surgery.capture.objects import Past
from surgery.capture.own import Capture, capture
from surgery.capture.replay import Replay
from surgery.errors import CaptureError

LIMIT = 8

#: What is done to a capture of a module before it is used.
Edit = Callable[[Capture, nn.Module], Capture]


class Forward:
    """What a module's forward became.

    Args:
        first: A capture of the module's forward, edited already; None to capture at the first
            call.
        edit: Done to every later capture before it is used, such as rewiring its residuals.
        inline: Paths of the children to look into; those of ``first`` if there is one.
        function: Gives the forward to capture of a module; the one that ``first`` is of, or the
            module's present one, if left out.
        limit: How many variants there may be.
    """

    def __init__(
        self,
        first: Capture | None = None,
        *,
        edit: Edit | None = None,
        inline: tuple[str, ...] = (),
        function: Callable[[nn.Module], Callable[..., Any]] | None = None,
        limit: int = LIMIT,
    ) -> None:
        self._edit = edit or _unchanged
        self._inline = inline if first is None else first.inline
        self._traced = None if first is None else first.function
        self._function = function
        self._limit = limit
        self._lock = threading.RLock()
        self.variants: tuple[Capture, ...] = () if first is None else (first,)

    def add(self, variant: Capture) -> None:
        """Take on a variant that was captured and edited elsewhere, unless its like is there.

        Raises:
            CaptureError: there are as many as there may be.
        """
        with self._lock:
            if any(known.source == variant.source for known in self.variants):
                return
            self._publish(variant, "a further one was to be added")

    def __call__(
        self, module: nn.Module, *args: Any, extra: tuple[Any, ...] = (), **kwargs: Any
    ) -> Any:
        """Run the forward with ``module`` as ``self``.

        Args:
            module: What the forward is run on.
            args: Positional arguments of the forward.
            extra: The inputs that the edit has put after the forward's own.
            kwargs: Keyword arguments of the forward.

        Raises:
            CaptureError: the call needs a variant more than the limit, or a new one while
                compiling or exporting; names the guard.
        """
        for variant in self.variants:
            values = variant.bind(*args, **kwargs)
            if variant.accepts_values(module, values):
                return self._run(variant, module, values, _Call(args, kwargs, extra))
        self._not_while_compiling(module)
        with self._lock:
            variant = self._accepting(module, args, kwargs)  # another thread may have made it
            if variant is None:
                why = self._why_not(module, args, kwargs)
                variant = self._capture(module, args, kwargs, why)
        values = variant.bind(*args, **kwargs)
        return self._run(variant, module, values, _Call(args, kwargs, extra))

    def _run(
        self, variant: Capture, module: nn.Module, values: tuple[Any, ...], call: _Call
    ) -> Any:
        try:
            return variant.run(module, values, call.extra)
        except Miss as miss:
            guard = variant.code.inline[miss.index]
            replay = Replay(variant, module, values, call.extra, miss)
        return self._take_over(variant, guard, replay, call)

    def _take_over(
        self,
        variant: Capture,
        guard: Guard,
        replay: Replay,
        call: _Call,
    ) -> Any:
        """Finish a call whose ``guard`` failed, along a variant that goes its way."""
        missed: Guard | None = guard
        while missed is not None:
            other = self._continuing(replay)
            if other is None:
                self._not_while_compiling(replay.module)
                if replay.disturbed():
                    raise CaptureError(
                        f"{variant.kind}: captured for {missed}, which no longer holds, and the "
                        "call has already changed an input",
                        hint=_HINT,
                    )
                other = self._capture_continuing(replay, call, missed)
            missed = replay.finish(other)
        return replay.result

    def _capture_continuing(self, replay: Replay, call: _Call, guard: Guard) -> Capture:
        with self._lock:
            made = self._continuing(replay)  # another thread may have made it
            if made is None:
                past = replay.past()
                made = self._capture(replay.module, call.args, call.kwargs, str(guard), past)
        if not replay.can_continue(made):
            raise CaptureError(
                f"{made.kind}: captured for {guard}; capturing again took another way, "
                f"{replay.parting(made)}"
            )
        return made

    def _accepting(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Capture | None:
        for variant in self.variants:
            if variant.accepts(module, *args, **kwargs):
                return variant
        return None

    def _continuing(self, replay: Replay) -> Capture | None:
        for variant in self.variants:
            if replay.can_continue(variant):
                return variant
        return None

    def _not_while_compiling(self, module: nn.Module) -> None:
        kind = type(module).__name__
        if torch.compiler.is_dynamo_compiling():
            # An error with this text under fullgraph; elsewhere the call goes on uncompiled.
            private.graph_break(f"{kind}: {_NOT_NOW}: {_HINT}")
        elif torch.compiler.is_compiling():
            raise CaptureError(f"{kind}: {_NOT_NOW}", hint=_HINT)

    def _capture(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        why: str,
        past: Past | None = None,
    ) -> Capture:
        """A new variant for this call, published whole; the lock is held."""
        self._room(type(module).__name__, why)
        function = self._traced if self._function is None else self._function(module)
        found = capture(module, args, kwargs, inline=self._inline, function=function, past=past)
        made = self._edit(found, module)
        self._publish(made, why)
        return made

    def _publish(self, variant: Capture, why: str) -> None:
        self._room(variant.kind, why)
        self.variants = (*self.variants, variant)

    def _room(self, kind: str, why: str) -> None:
        if len(self.variants) >= self._limit:
            raise CaptureError(f"{kind}: {len(self.variants)} variants already; {why}")

    def _why_not(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        if not self.variants:
            return "none is captured yet"
        last = self.variants[-1]
        return last.why_not(module, last.bind(*args, **kwargs))


class _Call(NamedTuple):
    """A call that is under way."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extra: tuple[Any, ...]


_NOT_NOW = "no captured variant fits this call, and none can be captured while compiling"
_HINT = "run the model once on such an input beforehand, outside torch.compile and torch.export"


def _unchanged(made: Capture, module: nn.Module) -> Capture:
    return made
