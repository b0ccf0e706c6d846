"""Copies of a model to measure on, which share its weights and nothing else.

A copy has its own modules, buffers, hooks and flags, so that nothing that is done to it shows in
the model; its parameters are new objects over the same memory.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from surgery.errors import ModelStateError
from surgery.record import record_of
from surgery.tree import named_modules, named_parameters, own_buffers, own_parameters


def sharing(model: nn.Module, *, owned: Iterable[str] = ()) -> nn.Module:
    """A copy of a model whose parameters share the model's memory.

    Args:
        model: Unchanged.
        owned: Names of the parameters that the copy gets memory of its own for.

    Raises:
        ModelStateError: something in the model cannot be copied.
    """
    private = set(owned)
    memo: dict[int, Any] = {}
    by_id: dict[int, list[str]] = {}
    parameters = dict(named_parameters(model))
    for name, parameter in parameters.items():
        by_id.setdefault(id(parameter), []).append(name)
    for names in by_id.values():
        parameter = parameters[names[0]]
        if private.isdisjoint(names) and _can_share(parameter):
            memo[id(parameter)] = _over_same_memory(parameter, parameter.requires_grad)
    record = record_of(model)
    if record is not None:
        for operation in record.operations:
            memo.update({id(tensor): tensor for tensor in operation.kept.values()})
    try:
        return copy.deepcopy(model, memo)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ModelStateError(f"the model cannot be copied: {error}") from error


def share_what_is_equal(model: nn.Module, original: nn.Module) -> None:
    """Give up a copy's own memory wherever it holds the same bits as the original's."""
    stock = dict(named_parameters(original))
    done: dict[int, nn.Parameter] = {}
    for path, module in named_modules(model):
        for key, parameter in own_parameters(module).items():
            name = f"{path}.{key}" if path else key
            if id(parameter) not in done:
                twin = stock.get(name)
                if twin is not None and _is_copy(parameter, twin):
                    done[id(parameter)] = _over_same_memory(twin, parameter.requires_grad)
                else:
                    done[id(parameter)] = parameter
            own = cast("dict[str, nn.Parameter]", module.__dict__["_parameters"])
            own[key] = done[id(parameter)]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a DTensor: its other shards lie in other processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


def _can_share(parameter: nn.Parameter) -> bool:
    # A subclass may carry attributes that only its own deepcopy knows.
    return type(parameter) is nn.Parameter or is_traceable_wrapper_subclass(parameter)


def _over_same_memory(parameter: nn.Parameter, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=requires_grad)


def _is_copy(one: nn.Parameter, other: nn.Parameter) -> bool:
    if type(one) is not nn.Parameter or type(other) is not nn.Parameter:
        return False
    if one.device.type == "meta" or one.data_ptr() == other.data_ptr():
        return False
    layout = (one.shape, one.dtype, one.device, one.stride())
    if layout != (other.shape, other.dtype, other.device, other.stride()):
        return False
    return same_bits(one.detach(), other.detach())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits, NaN payloads included."""
    if one.is_contiguous() and other.is_contiguous():
        one, other = one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    return torch.equal(one, other)


@contextmanager
def buffers_put_back(model: nn.Module) -> Generator[None]:
    """Undo, when the block ends, whatever it did to a copy's buffers."""
    before = [
        (module, key, buffer, buffer.detach().clone())
        for _, module in named_modules(model, duplicates=False)
        for key, buffer in own_buffers(module).items()
    ]
    try:
        yield
    finally:
        for module, key, buffer, values in before:
            cast("dict[str, Tensor]", module.__dict__["_buffers"])[key] = buffer
            with torch.no_grad():
                buffer.copy_(values)
