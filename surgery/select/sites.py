"""What a rule can name: the modules of a model, and the parameters outside single-weight layers.

Nothing here runs or traces the model, so a 70B model on the meta device costs milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.capture.graft import stock_class

# Where torch keeps what computes a parametrized weight: part of the layer, no module of the model.
_PARAMETRIZATIONS = "parametrizations"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Torch's own modules that hold several matrices, or other modules, and so are no single layer.
_COMPOSITES = (
    *_CONTAINERS,
    nn.ParameterList,
    nn.ParameterDict,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


@dataclass(frozen=True, eq=False)
class Site:
    """A place a rule can name: a module, or a parameter outside any single-weight layer.

    Attributes:
        path: Dotted name of the module, or of the parameter if ``parameter`` is set.
        module: The module, or the module that holds the parameter.
        parameter: Name of the parameter within ``module``: 3-D expert weights,
            ``nn.MultiheadAttention.in_proj_weight``, a position embedding, ...
        created_by: Id of the rule that made it; None for what the model came with.
    """

    path: str
    module: nn.Module = field(repr=False)
    parameter: str | None = None
    created_by: str | None = None

    @cached_property
    def stock(self) -> type[nn.Module]:
        """The class of the module, whatever a rewrite grafted onto it."""
        return stock_class(self.module)

    @cached_property
    def what(self) -> str:
        """The site's kind for messages: the class, or ``parameter of`` the class."""
        name = self.stock.__name__
        return name if self.parameter is None else f"parameter of {name}"

    @cached_property
    def weight(self) -> Tensor | None:
        """The tensor the site stands for: the parameter, or a layer's largest one; else None."""
        own = own_parameters(self.module)
        if self.parameter is not None:
            return own.get(self.parameter)
        if not is_layer(self.module):
            return None
        original = _parametrized(self.module)
        tensors = [*own.values(), *([] if original is None else [original])]
        return max(tensors, key=lambda tensor: (tensor.dim(), tensor.numel()), default=None)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """What ``shape`` compares: ``in`` and ``out`` features, ``rank`` and ``numel``.

        ``in`` and ``out`` are the logical ones, whichever way round the weight is stored; they are
        absent where the site has no such thing (a norm, a block).
        """
        weight = self.weight
        if weight is None:
            return {}
        widths = self._widths(weight)
        found = {} if widths is None else {"in": widths[0], "out": widths[1]}
        return {**found, "rank": weight.dim(), "numel": weight.numel()}

    def _widths(self, weight: Tensor) -> tuple[int, int] | None:
        if self.parameter is not None:
            return _bare_widths(self.module, weight)
        return layer_widths(self.module)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters a module holds itself, by name, without calling any property."""
    own = cast("dict[str, nn.Parameter | None]", module.__dict__.get("_parameters", {}))
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def own_children(module: nn.Module) -> dict[str, nn.Module]:
    """The modules a module holds directly, less those that a rewrite or a parametrization added."""
    own = cast("dict[str, nn.Module | None]", module.__dict__.get("_modules", {}))
    return {name: child for name, child in own.items() if child is not None and not _added(child)}


def _added(child: nn.Module) -> bool:
    home = type(child).__module__
    # A backbone is a model like any other: its layers are what rules name, nothing inserted.
    ours = home.startswith(("surgery.", "architectures."))
    if ours and not home.startswith("architectures.backbones."):
        return True
    members = cast("dict[str, nn.Module]", child.__dict__["_modules"]).values()
    return isinstance(child, nn.ModuleDict) and any(
        type(member).__module__ == "torch.nn.utils.parametrize" for member in members
    )


def is_container(module: nn.Module) -> bool:
    """Whether a module is a list of modules: ModuleList, Sequential or ModuleDict."""
    return isinstance(module, _CONTAINERS)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one layer around at most one weight, and so a site as a whole.

    True for torch's own layers and classes derived from them, and for modules without children
    whose parameters are vectors and at most one matrix (an RMSNorm, HF's Conv1D, a router).
    """
    return _is_layer(module, own_parameters(module))


def _is_layer(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    if isinstance(module, _COMPOSITES):
        return False
    if any(cls.__module__.startswith("torch.nn.modules.") for cls in _torch_bases(module)):
        return True
    if own_children(module):
        return False
    matrices = [tensor for tensor in parameters.values() if not _is_vector(tensor)]
    return not matrices or [tensor.dim() for tensor in matrices] == [2]


def _is_vector(tensor: Tensor) -> bool:
    """Whether a tensor is a vector, written with further axes of size 1 or not."""
    return sum(size > 1 for size in tensor.shape) < 2


def _torch_bases(module: nn.Module) -> Iterator[type]:
    return (cls for cls in type(module).__mro__ if cls is not nn.Module)


def _parametrized(module: nn.Module) -> Tensor | None:
    """The original of a parametrized weight; reading the weight itself would compute it."""
    held = module.__dict__.get("_modules", {}).get(_PARAMETRIZATIONS)
    if not isinstance(held, nn.ModuleDict):
        return None
    originals = [tensor for tensor in held.parameters() if tensor.dim() > 1]
    return max(originals, key=torch.numel, default=None)


def layer_widths(module: nn.Module) -> tuple[int, int] | None:
    """Logical (in, out) features of a layer, or None if it has none or they cannot be told.

    Torch's layers say so themselves. For another class around one matrix, the bias decides if
    only one side has its size, else two tries on the meta device.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return module.num_embeddings, module.embedding_dim
    own = own_parameters(module)
    matrices = {name: tensor for name, tensor in own.items() if tensor.dim() == 2}
    if len(matrices) != 1 or not is_layer(module):
        return None
    ((name, matrix),) = matrices.items()
    return _matrix_widths(module, name, (matrix.shape[0], matrix.shape[1]))


_probed: dict[tuple[type, str, tuple[int, int], tuple[int, ...]], tuple[int, int] | None] = {}


def _matrix_widths(module: nn.Module, name: str, shape: tuple[int, int]) -> tuple[int, int] | None:
    rows, columns = shape
    if rows == columns:
        return rows, columns
    vectors = [t.numel() for t in own_parameters(module).values() if t.dim() == 1]
    if rows in vectors and columns not in vectors:
        return columns, rows
    if columns in vectors and rows not in vectors:
        return rows, columns
    key = (stock_class(module), name, shape, tuple(vectors))
    if key not in _probed:
        fitting = [pair for pair in ((columns, rows), (rows, columns)) if _fits(module, pair)]
        _probed[key] = fitting[0] if len(fitting) == 1 else None
    return _probed[key]


def _fits(module: nn.Module, widths: tuple[int, int]) -> bool:
    """Whether the layer turns ``in`` features into ``out``, tried on a copy without storage."""
    twin = copy.copy(module)
    parameters = {n: t.detach().to("meta") for n, t in own_parameters(module).items()}
    twin.__dict__ = {**module.__dict__, "_parameters": parameters}
    call = cast("Any", stock_class(module).forward)
    try:
        with torch.no_grad():
            made = call(twin, torch.empty(2, widths[0], device="meta"))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        # Not this way round, or not a layer of one input: either way it does not fit.
        return False
    results = cast("tuple[Any, ...]", made) if isinstance(made, tuple) else (made,)
    first = next((result for result in results if isinstance(result, Tensor)), None)
    return first is not None and first.shape[-1] == widths[1]


def _bare_widths(holder: nn.Module, weight: Tensor) -> tuple[int, int] | None:
    """(in, out) of the matrices in a parameter, read ``(..., out, in)`` as torch stores them.

    Where that reading does not chain (what the holder's first weight takes in is not what its
    last gives out) and the transposed one does, the transposed one is right.
    """
    if weight.dim() < 2:
        return None
    mates = [t for t in own_parameters(holder).values() if t.dim() == weight.dim()]
    first, last = mates[0].shape, mates[-1].shape
    transposed = len(mates) > 1 and first[-1] != last[-2] and first[-2] == last[-1]
    out, width = (weight.shape[-1], weight.shape[-2]) if transposed else weight.shape[-2:]
    return width, out


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (path, module) of a model, a shared module under each of its paths."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        yield path, module
        prefix = f"{path}." if path else ""
        children = cast("dict[str, nn.Module | None]", module.__dict__["_modules"])
        stack.extend(
            (prefix + name, child)
            for name, child in reversed(children.items())
            if child is not None and name != _PARAMETRIZATIONS
        )


def bare_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module that are sites of their own."""
    own = own_parameters(module)
    return () if not own or _is_layer(module, own) else tuple(own)
