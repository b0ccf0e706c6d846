"""What this package uses of torch that is private or untyped, in one place, typed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_C = cast("Any", torch._C)  # pyright: ignore[reportPrivateUsage]
_ENGINE = cast("Any", torch.autograd.Variable)._execution_engine
_KNOWN = (Tensor, nn.Parameter)


def current_backward() -> int:
    """A number for the running backward pass, unique in this process; -1 outside of one."""
    return _C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` once when the running backward pass has succeeded."""
    _ENGINE.queue_callback(callback)


def symbolic(*tensors: Tensor) -> bool:
    """Whether these tensors stand for others, so that only plain operations may touch them.

    So it is under ``torch.compile``, ``torch.export`` and ``torch.jit.trace``, under torch.func,
    ``is_grads_batched``, forward-mode AD and dispatch modes, for subclasses of Tensor and on the
    meta device.
    """
    if torch.compiler.is_compiling():
        return True
    return (
        _C._get_tracing_state() is not None
        or _C._are_functorch_transforms_active()
        or cast("Any", forward_ad)._current_level >= 0
        or _C._len_torch_dispatch_stack() > 0
        or any(_stands_for_another(tensor) for tensor in tensors)
    )


def _stands_for_another(tensor: Tensor) -> bool:
    if type(tensor) not in _KNOWN or tensor.is_meta:
        return True
    return _C._functorch.is_legacy_batchedtensor(tensor)


@cache
def has_triton() -> bool:
    """Whether Triton is installed: torch brings it along on Linux with CUDA, not elsewhere."""
    return find_spec("triton") is not None


def version(tensor: Tensor) -> int | None:
    """How often the memory of ``tensor`` was written; None for an inference tensor."""
    return None if tensor.is_inference() else tensor._version


def floats(vector: Tensor) -> list[float]:
    """The numbers of a vector on the CPU."""
    return cast("Any", vector).tolist()


def split(vector: Tensor, size: int) -> tuple[Tensor, ...]:
    """Consecutive pieces of ``size`` elements, the last one maybe shorter."""
    return cast("Any", vector).split(size)
