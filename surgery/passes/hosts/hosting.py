"""Which host fits a site, decided from the structure of its layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from architectures.adapters import Matrix
from surgery.capture.graft import stock_class
from surgery.passes.hosts.code import cooperates, reads
from surgery.passes.hosts.conv import Conv1dHost, Conv2dHost, Conv3dHost
from surgery.passes.hosts.embedding import EmbeddingHost
from surgery.passes.hosts.linear import LinearHost, OutputHost
from surgery.passes.hosts.matmul import is_transposed
from surgery.passes.hosts.weight import WeightHost
from surgery.passes.links import is_mapped
from surgery.select.sites import is_layer
from surgery.tree import own_parameters

HOSTS: dict[str, type] = {
    "linear": LinearHost,
    "embedding": EmbeddingHost,
    "conv1d": Conv1dHost,
    "conv2d": Conv2dHost,
    "conv3d": Conv3dHost,
    "output": OutputHost,
    "weight": WeightHost,
}

_PRIMITIVES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}


@dataclass(frozen=True)
class Hosting:
    """How a site can carry adapters.

    Attributes:
        host: Key in ``HOSTS``.
        parameter: Name of the adapted parameter within the module.
        matrix: How it is read as a matrix.
        dtype: Of the tensors an adapter gets by default.
        readable: Whether the weight's values can be read and changed; not if it is quantised, or
            the dual of a mirror map.
    """

    host: str
    parameter: str
    matrix: Matrix
    dtype: torch.dtype
    readable: bool = True

    @property
    def takes_dropout(self) -> bool:
        """Whether the host sees the input, so that it can drop some of it."""
        return self.host != "weight"


def hosting_of(module: nn.Module, parameter: str | None, *, read_outside: bool) -> Hosting | str:
    """How a module's parameter can be adapted, or why it cannot.

    Args:
        module: The module.
        parameter: A parameter of a module that is no single layer; None for a layer's weight.
        read_outside: Whether another module computes with the weight.
    """
    found = _found(module, parameter, read_outside=read_outside)
    if isinstance(found, Hosting) and is_mapped(module, found.parameter):
        return replace(found, readable=False)
    return found


def _found(module: nn.Module, parameter: str | None, *, read_outside: bool) -> Hosting | str:
    if isinstance(module, ParametrizationList):
        return "it lies behind a parametrization; the layer it belongs to is the site to adapt"
    if parameter is not None:
        return _through_weight(module, parameter, stacked=True, read_outside=read_outside)
    if not is_layer(module):
        return "it is no single layer; its parameters and the layers inside are sites of their own"
    for primitive, host in _PRIMITIVES.items():
        if isinstance(module, primitive):
            return _of_primitive(module, primitive, host, read_outside=read_outside)
    return _of_other_layer(module, read_outside=read_outside)


def _of_primitive(
    module: nn.Module, primitive: type[nn.Module], host: str, *, read_outside: bool
) -> Hosting | str:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its max_norm rescales the weight itself in every forward"
    stock = stock_class(module)
    weight = own_parameters(module).get("weight")
    original = _parametrized(module) if weight is None else None
    tensor = weight if original is None else original
    if tensor is None:
        return "it has no weight of its own"
    if isinstance(tensor, UninitializedParameter):
        return "its weight is not initialised yet; run the model once first"
    matrix = Matrix.of(_shape(module, tensor), stacked=False)
    readable = original is None and is_plain(tensor)
    direct = cooperates(stock, primitive) and (
        not host.startswith("conv") or cooperates(stock, primitive, "_conv_forward")
    )
    if direct and not read_outside:
        return Hosting(host, "weight", matrix, _adapter_dtype(module, tensor), readable)
    if readable:
        return Hosting("weight", "weight", matrix, tensor.dtype)
    if host == "linear" and not read_outside:
        return Hosting("output", "weight", matrix, _adapter_dtype(module, tensor), False)
    return "its weight is used outside of its own forward, and is quantised or parametrised"


def _of_other_layer(module: nn.Module, *, read_outside: bool) -> Hosting | str:
    own = own_parameters(module)
    wide = [name for name, tensor in own.items() if tensor.dim() > 1]
    features = [module.__dict__.get(name) for name in ("out_features", "in_features")]
    readable = len(wide) == 1 and is_plain(own[wide[0]])
    if not readable and all(isinstance(size, int) for size in features):
        matrix = Matrix.of(cast("tuple[int, int]", tuple(features)), stacked=False)
        return Hosting("output", "weight", matrix, _floating_dtype(module), False)
    if not wide:
        return "it has no weight of two or more dimensions"
    if len(wide) > 1:
        return f"it has several weights ({', '.join(wide)}); name one of them"
    if not readable:
        return f"its {wide[0]} is {own[wide[0]].dtype}, and its in_features are not known"
    name, tensor = wide[0], own[wide[0]]
    transposed = is_transposed(module, name) if tensor.dim() == 2 and not read_outside else None
    if transposed is None:
        stacked = not isinstance(module, _ConvNd)
        return _through_weight(module, name, stacked=stacked, read_outside=read_outside)
    matrix = Matrix.of(tuple(tensor.shape), stacked=False, transposed=transposed)
    return Hosting("output", name, matrix, tensor.dtype)


def _through_weight(
    module: nn.Module, parameter: str, *, stacked: bool, read_outside: bool
) -> Hosting | str:
    tensor = own_parameters(module).get(parameter)
    if tensor is None:
        return f"it has no parameter {parameter!r} of its own"
    if tensor.dim() < 2:
        return f"its {parameter} has {tensor.dim()} dimension(s); a low-rank change needs two"
    if not is_plain(tensor):
        return f"its {parameter} is {tensor.dtype} {type(tensor).__name__}, which cannot be read"
    if not read_outside and not reads(stock_class(module), parameter):
        return f"its forward does not read {parameter} by that name"
    matrix = Matrix.of(tuple(tensor.shape), stacked=stacked)
    return Hosting("weight", parameter, matrix, tensor.dtype)


def _parametrized(module: nn.Module) -> Tensor | None:
    """One original tensor of a weight under ``torch.nn.utils.parametrize``, or None."""
    held = module.__dict__["_modules"].get("parametrizations")
    if not isinstance(held, nn.ModuleDict) or "weight" not in held:
        return None
    return next(held["weight"].parameters(recurse=False))


def _shape(module: nn.Module, tensor: Tensor) -> tuple[int, ...]:
    """Shape of the weight: a packed or parametrised tensor may have another."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    return tuple(tensor.shape)


def is_plain(tensor: Tensor) -> bool:
    """Whether the values of a tensor are numbers one can add to."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype.itemsize > 1
    )


def _adapter_dtype(module: nn.Module, weight: Tensor) -> torch.dtype:
    plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    return weight.dtype if plain else _floating_dtype(module)


def _floating_dtype(module: nn.Module) -> torch.dtype:
    """What a quantised layer computes in, as far as its bias or scales tell; else float32."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    wide = [t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
    return wide[0] if wide else torch.float32
