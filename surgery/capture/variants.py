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
from typing import Any

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


class Forward:
    """What a module's forward became.

    Args:
        first: A capture of the module's forward.
        edit: Done to every capture before it is used, such as rewiring its residuals.
        limit: How many variants there may be.
    """

    def __init__(
        self,
        first: Capture,
        *,
        edit: Callable[[Capture], Capture] | None = None,
        limit: int = LIMIT,
    ) -> None:
        self._edit = edit or _unchanged
        self._limit = limit
        self._lock = threading.RLock()
        self.variants: tuple[Capture, ...] = (self._edit(first),)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forward with ``module`` as ``self``.

        Raises:
            CaptureError: the call needs a variant more than the limit, or a new one while
                compiling or exporting; names the guard.
        """
        for variant in self.variants:
            values = variant.bind(*args, **kwargs)
            if variant.accepts_values(module, values):
                return self._run(variant, module, values, args, kwargs)
        self._not_while_compiling()
        with self._lock:
            variant = self._accepting(module, args, kwargs)  # another thread may have made it
            if variant is None:
                why = self._why_not(module, args, kwargs)
                variant = self._capture(module, args, kwargs, why)
        return self._run(variant, module, variant.bind(*args, **kwargs), args, kwargs)

    def _run(
        self,
        variant: Capture,
        module: nn.Module,
        values: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            return variant.run(module, values)
        except Miss as miss:
            guard = variant.code.inline[miss.index]
            replay = Replay(variant, module, values, miss)
        return self._take_over(variant, guard, replay, args, kwargs)

    def _take_over(
        self,
        variant: Capture,
        guard: Guard,
        replay: Replay,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Finish a call whose ``guard`` failed, along a variant that goes its way."""
        missed: Guard | None = guard
        while missed is not None:
            other = self._continuing(replay)
            if other is None:
                self._not_while_compiling()
                if replay.disturbed():
                    raise CaptureError(
                        f"{variant.kind}: captured for {missed}, which no longer holds, and the "
                        "call has already changed an input",
                        hint=_HINT,
                    )
                other = self._capture_continuing(replay, args, kwargs, missed)
            missed = replay.finish(other)
        return replay.result

    def _capture_continuing(
        self, replay: Replay, args: tuple[Any, ...], kwargs: dict[str, Any], guard: Guard
    ) -> Capture:
        with self._lock:
            found = self._continuing(replay)  # another thread may have made it
            made = found or self._capture(replay.module, args, kwargs, str(guard), replay.past())
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

    def _not_while_compiling(self) -> None:
        kind = self.variants[0].kind
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
        first = self.variants[0]
        if len(self.variants) >= self._limit:
            raise CaptureError(f"{first.kind}: {len(self.variants)} variants already; {why}")
        found = capture(
            module, args, kwargs, inline=first.inline, function=first.function, past=past
        )
        made = self._edit(found)
        self.variants = (*self.variants, made)
        return made

    def _why_not(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        last = self.variants[-1]
        return last.why_not(module, last.bind(*args, **kwargs))


_NOT_NOW = "no captured variant fits this call, and none can be captured while compiling"
_HINT = "run the model once on such an input beforehand, outside torch.compile and torch.export"


def _unchanged(made: Capture) -> Capture:
    return made
