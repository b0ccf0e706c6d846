"""The blocks of a model, each captured at the call that the model makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from surgery.capture.clone import Clones
from surgery.capture.own import Capture, capture
from surgery.capture.settle import settle
from surgery.capture.trace import is_atomic, placeholders
from surgery.capture.tracing import Options, Tracer
from surgery.errors import CaptureError


def capture_blocks(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    paths: Sequence[str],
    inline: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Capture]:
    """Run ``model(*args, **kwargs)`` once on fake tensors, and capture blocks as they are called.

    The model, its flags, buffers and caches and the random generators are left as they were.

    Args:
        model: Any module, on any device; on meta too.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        paths: The modules to capture, none of them inside another.
        inline: Path of a block → the children whose forwards become part of its graph, relative
            to the block.

    Returns:
        By path, in the order of ``paths``, each block's capture at its first call.

    Raises:
        CaptureError: a block cannot be traced, or the run does not call it; names the block and
            the statement.
    """
    job = _Job(model, frozenset(paths), inline or {})
    settle(lambda options: job.run(options, args, dict(kwargs or {})), Options())
    return {path: job.result(path) for path in paths}


class _Job:
    """What `capture_blocks` was asked for, and what it has found so far."""

    def __init__(
        self, model: nn.Module, paths: frozenset[str], inline: Mapping[str, tuple[str, ...]]
    ) -> None:
        self._model = model
        self._paths = paths
        self._inline = inline
        self._found: dict[str, Capture | CaptureError] = {}

    def run(self, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the whole model."""
        clones = Clones(self._model, keep_caches=options.keep_caches)
        tracer = Tracer(clones, is_atomic, options, watch=self._called)
        given, named = placeholders(tracer, self._model, args, kwargs)
        try:
            with tracer.recording():
                clones.root(*given, **named)
        except CaptureError:
            raise
        except Exception as error:
            raise tracer.writer.failed(error) from error

    def result(self, path: str) -> Capture:
        """What became of a block."""
        found = self._found.get(path)
        if found is None:
            raise CaptureError(f"{path} is not called when the model runs on the example")
        if isinstance(found, CaptureError):
            raise CaptureError(f"{path}: {found.message}", hint=found.hint) from found
        return found

    def _called(self, path: str, given: Callable[[], Any]) -> None:
        if path in self._paths and path not in self._found:
            self._found[path] = self._capture(path, *given())

    def _capture(
        self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Capture | CaptureError:
        block = self._model.get_submodule(path)
        try:
            return capture(block, args, kwargs, inline=self._inline.get(path, ()))
        except CaptureError as error:  # raised when the run is over, which it does not concern
            return error
