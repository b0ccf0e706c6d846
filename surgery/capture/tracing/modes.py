"""What torch calls go through while a trace runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode

from surgery.capture import private

if TYPE_CHECKING:
    from surgery.capture.tracing.tracer import Tracer


class _Active(threading.local):
    """The innermost trace of each thread: a module that a parent's trace runs may need one."""

    tracer: Tracer | None = None


ACTIVE = _Active()


class Recorder(TorchFunctionMode):
    """Hands every torch call of this thread to the tracer."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Record a call, unless it belongs to a trace within this one."""
        if ACTIVE.tracer is not self._tracer:
            return func(*args, **(kwargs or {}))
        return self._tracer.call(func, args, kwargs or {})


class SharedTensors(TorchFunctionMode):
    """Inside, copies of objects hold the same tensors: a trace never writes to a real one.

    Args:
        fake_only: Only those without contents, which cannot be copied.
    """

    def __init__(self, *, fake_only: bool = False) -> None:
        super().__init__()
        self._fake_only = fake_only

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry out a call, but give back the tensor that was to be copied."""
        if func is not private.COPY_TENSOR:
            return func(*args, **(kwargs or {}))
        if not self._fake_only or isinstance(args[0], private.FakeTensor):
            return args[0]
        with private.without_torch_function():
            return func(*args, **(kwargs or {}))
