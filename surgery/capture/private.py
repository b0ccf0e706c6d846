# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The parts of torch below its public surface that a trace needs, each behind a typed name."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "CHECKPOINT",
    "CHECKPOINT_CODE",
    "CONVOLUTION",
    "COPY_TENSOR",
    "NEEDS_DATA",
    "NORM_BASE",
    "RECURRENT",
    "SET_GRAD_ENABLED",
    "FakeTensor",
    "FakeTensorMode",
    "call_inner",
    "fake_mode_of",
    "graph_break",
    "intercept_calls",
    "is_operator",
    "is_real",
    "new_fake_mode",
    "no_autograd",
    "own_tensors",
    "storage_of",
    "to_fake",
    "unhandled",
    "with_torch_function",
    "without_torch_function",
    "writes_arguments",
]

# Raised by fake tensors when a result's shape depends on contents, or an operator has no rule.
NEEDS_DATA: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
NORM_BASE: type[nn.Module] = nn.modules.batchnorm._NormBase
CHECKPOINT: Callable[..., Any] = torch.utils.checkpoint.checkpoint
CHECKPOINT_CODE: types.CodeType = torch.utils.checkpoint._checkpoint_impl.__code__
CONVOLUTION: type[nn.Module] = nn.modules.conv._ConvNd
RECURRENT: tuple[type[nn.Module], ...] = (nn.RNNBase, nn.RNNCellBase)
COPY_TENSOR: Any = torch.Tensor.__deepcopy__
SET_GRAD_ENABLED: Callable[[bool], None] = torch._C._set_grad_enabled


def call_inner(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with its hooks, past whatever `intercept_calls` put in the way."""
    return module._call_impl(*args, **kwargs)


def intercept_calls(module: nn.Module, handler: Callable[..., Any]) -> None:
    """Send ``module(...)`` to ``handler``; the slot ``nn.Module.compile`` uses, per instance."""
    module.__dict__["_compiled_call_impl"] = handler


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and plain tensor attributes of the module itself, by name."""
    for group in (module._parameters, module._buffers, module.__dict__):
        for name, value in group.items():
            if isinstance(value, torch.Tensor):
                yield name, value


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The module's own dictionary of buffers, to be written to."""
    return module._buffers


def own_composites(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own parameters that are made of several tensors, as quantised weights are."""
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and is_traceable_wrapper_subclass(parameter)
    }


def stand_in(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Have a tensor be read for one of the module's own parameters."""
    cast("dict[str, Any]", module._parameters)[name] = tensor


def new_fake_mode() -> FakeTensorMode:
    """A mode in which tensors have no data, and real ones may take part."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_mode_of(tensors: list[torch.Tensor]) -> FakeTensorMode | None:
    """The mode of the first fake tensor; None when all are real."""
    return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)


def to_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> FakeTensor:
    """The shape, dtype and device of ``tensor`` as a tensor without data."""
    if is_traceable_wrapper_subclass(tensor):
        # Made of several tensors, as quantised weights are. Its classes know the operators that
        # their layers call and few others, and a shape is all that is asked of a fake.
        with mode:
            plain = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        return cast("FakeTensor", plain)
    return mode.from_tensor(tensor.detach(), static_shapes=True)


def storage_of(tensor: torch.Tensor) -> tuple[int, object]:
    """What identifies the memory a tensor lives in, for as long as the second result is held.

    A tensor that is not strided stands for its own memory.
    """
    if tensor.layout is not torch.strided:
        return id(tensor), tensor
    storage = tensor.untyped_storage()
    return storage._cdata, storage


def wrapper(cls: type[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A tensor of class ``cls`` without data, with the metadata of ``like``."""
    strided = like.layout is torch.strided
    return torch.Tensor._make_wrapper_subclass(
        cls,
        like.shape,
        strides=like.stride() if strided else None,
        storage_offset=like.storage_offset() if strided else 0,
        dtype=like.dtype,
        layout=like.layout,
        device=like.device,
    )


# A tensor class whose ``__torch_function__`` is this is not asked: the mode has been.
unhandled: Any = torch._C._disabled_torch_function_impl


def with_torch_function() -> contextlib.AbstractContextManager[None]:
    """Inside, modes are asked again, also where somebody switched that off."""
    return torch._C._EnableTorchFunction()


def without_torch_function() -> contextlib.AbstractContextManager[None]:
    """Inside, torch functions are called without asking modes and subclasses."""
    return torch._C.DisableTorchFunction()


def is_operator(func: object) -> bool:
    """True for an overload of ``torch.ops``, as the dispatcher hands it out."""
    return isinstance(func, torch._ops.OpOverload)


def writes_arguments(func: Any) -> bool:
    """True when the schema of a `torch.ops` overload says that it writes to an argument."""
    return func._schema.is_mutable


def is_real(tensor: torch.Tensor) -> bool:
    """True for a tensor with contents."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def graph_break(message: str) -> None:
    """End what torch.compile is compiling; an error with this message under ``fullgraph``."""
    torch._dynamo.graph_break(message)


@contextlib.contextmanager
def no_autograd() -> Generator[None]:
    """`torch.no_grad` without the cost of its bookkeeping: entered once per traced call."""
    before = torch.is_grad_enabled()
    SET_GRAD_ENABLED(False)
    try:
        yield
    finally:
        SET_GRAD_ENABLED(before)


@contextlib.contextmanager
def for_real() -> Generator[None]:
    """Inside, torch computes: no modes of the trace, no autograd; generators are put back."""
    with (
        without_torch_function(),
        unset_fake_temporarily(),
        torch.random.fork_rng(),
        torch.no_grad(),
    ):
        yield
