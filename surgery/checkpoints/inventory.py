"""Every tensor of a model under one name, with the other names it goes by."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from surgery.checkpoints.tensorfile import DTYPES
from surgery.errors import CheckpointError
from surgery.tree import named_modules, own_buffers, own_parameters


@dataclass(frozen=True)
class Place:
    """Where a tensor is registered: ``module._parameters[key]`` or ``module._buffers[key]``.

    Attributes:
        module: The module it is registered on.
        key: Its name there.
        is_parameter: Whether it is a parameter, not a buffer.
        persistent: Whether state dicts hold it.
    """

    module: nn.Module
    key: str
    is_parameter: bool
    persistent: bool

    @property
    def tensor(self) -> Tensor:
        """What is registered there now."""
        return self._registry[self.key]

    def put(self, tensor: Tensor) -> None:
        """Register another tensor there."""
        self._registry[self.key] = tensor

    @property
    def _registry(self) -> dict[str, Tensor]:
        registry = "_parameters" if self.is_parameter else "_buffers"
        return cast("dict[str, Tensor]", self.module.__dict__[registry])


@dataclass
class Inventory:
    """The tensors of a model.

    Attributes:
        state: Parameters and persistent buffers, each under its first name.
        transient: Buffers that no state dict holds.
        ties: Every further name of a tensor → its name in ``state`` or ``transient``.
    """

    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    transient: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    ties: dict[str, str] = field(default_factory=dict[str, str])


def places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Every dotted name of every tensor, duplicates included, in the order of the state dict."""
    for path, module in named_modules(model):
        prefix = f"{path}." if path else ""
        for key in own_parameters(module):
            yield prefix + key, Place(module, key, is_parameter=True, persistent=True)
        transient = cast("set[str]", module.__dict__["_non_persistent_buffers_set"])
        for key in own_buffers(module):
            yield prefix + key, Place(module, key, False, key not in transient)


def take(model: nn.Module) -> Inventory:
    """List a model's tensors."""
    found = Inventory()
    first: dict[Hashable, str] = {}
    # Persistent names first: a tensor known by both kinds of name belongs to the state.
    for name, place in sorted(places(model), key=lambda pair: not pair[1].persistent):
        tensor = place.tensor
        known = next((first[key] for key in _keys(tensor) if key in first), None)
        if known is not None:
            found.ties[name] = known
            continue
        first.update(dict.fromkeys(_keys(tensor), name))
        (found.state if place.persistent else found.transient)[name] = tensor
    return found


def _keys(tensor: Tensor) -> Iterator[Hashable]:
    """What two names of one tensor have in common: the object, or all of its memory."""
    yield id(tensor)
    plain = tensor.layout is torch.strided and not is_quantised(tensor)
    if plain and tensor.numel() and tensor.device.type != "meta":
        layout = (tensor.dtype, tuple(tensor.shape), tensor.stride())
        yield (str(tensor.device), tensor.data_ptr(), *layout)


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is made of several, as torchao's quantised weights are."""
    return is_traceable_wrapper_subclass(tensor)


def check_storable(name: str, tensor: Tensor) -> None:
    """Raise unless a tensor can be written as it is.

    Raises:
        CheckpointError: it has no data, is sharded, quantised or sparse, or its dtype has no
            place in a safetensors file.
    """
    if tensor.device.type == "meta":
        raise CheckpointError(
            f"{name} is on the meta device and has no data to save",
            hint="materialise the model and load its weights first",
        )
    if isinstance(tensor, _dtensor()):
        raise CheckpointError(
            f"{name} is sharded over processes (DTensor)",
            hint="gather it first, for example with FSDP2's full state dict, and save that model",
        )
    if is_quantised(tensor):
        raise CheckpointError(
            f"{name} is quantised ({type(tensor.data).__name__}), which a whole save does not hold",
            hint="save what was inserted alone: surgery.save(model, folder, adapter_only=True)",
        )
    if tensor.layout is not torch.strided:
        raise CheckpointError(
            f"{name} is sparse ({tensor.layout}), expected a dense tensor",
            hint="convert it with to_dense() before saving",
        )
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, which safetensors does not have")


def _dtensor() -> type:
    """DTensor, if this process has imported it; else a class nothing is an instance of."""
    import sys

    module = sys.modules.get("torch.distributed.tensor")
    return cast("type", module.DTensor) if module is not None else _Nothing


class _Nothing:
    """Stands for a class that cannot have instances here."""


def memory_order(tensor: Tensor) -> list[int] | None:
    """Strides of a dense tensor that is not in C order, such as channels last; else None."""
    if tensor.is_contiguous():
        return None
    as_it_lies = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return list(tensor.stride()) if as_it_lies.stride() == tensor.stride() else None


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides visit each element of a block of memory exactly once, in some order."""
    if len(shape) != len(stride):
        return False
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True
