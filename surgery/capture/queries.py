"""What a model asks of a tensor besides computing with it, and the answer a trace gives.

Sizes come back symbolic. Contents (``bool(x)``, ``x.tolist()``) are computed and guarded.
Facts such as dtype are told; where a graph is to be run again they are guarded too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from surgery.capture.values import TensorSpec, is_proxy

if TYPE_CHECKING:
    from surgery.capture.tracing.tracer import Tracer

Query = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any]], Any]


def answer_attribute(tracer: Tracer, func: Any, name: str, tensor: Any) -> Any:
    """The value of ``tensor.name``."""
    if name == "shape":
        return tracer.symbols.shape(tensor)
    if name == "ndim":
        return len(tracer.symbols.shape(tensor))
    if name in _UNTRACED:
        return None
    result = func(tracer.fakes.unwrap(tensor))
    if isinstance(result, torch.Tensor):
        return tracer.record_attribute(tensor, name)
    if name == "requires_grad":
        return tracer.facts.tell(tensor, name, tensor.tracked if is_proxy(tensor) else result)
    if name == "device":
        return tracer.facts.device(tensor, result)
    return tracer.facts.tell(tensor, name, result)


# A trace has no autograd graph; nothing in a forward may depend on one.
_UNTRACED = frozenset({"grad", "grad_fn", "_grad", "_backward_hooks"})


def _size(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape: Any = tracer.symbols.shape(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return shape if dim is None else shape[dim]


def _rank(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return len(tracer.symbols.shape(args[0]))


def _numel(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return functools.reduce(operator.mul, tracer.symbols.shape(args[0]), 1)


def _length(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return operator.index(tracer.symbols.shape(args[0])[0])


def _layout(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*tracer.fakes.unwrap(args), **tracer.fakes.unwrap(kwargs))
    return tracer.facts.tell_method(func.__name__, args, kwargs, result)


def _bool(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return tracer.facts.contents(args[0], bool).demand("data")


def _int(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return tracer.facts.contents(args[0], int).demand("data")


def _float(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return tracer.facts.contents(args[0], float).demand("data")


def _item(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tracer.facts.contents(args[0], "item")


def _to_list(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape = tracer.symbols.shape(args[0])
    if not shape:
        return tracer.facts.contents(args[0], "item")
    rows = tracer.record(torch.Tensor.unbind, (args[0],), {})
    return [_to_list(tracer, func, (row,), {}) for row in rows]


def _contains(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool((args[0] == args[1]).any())


def _repr(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return f"<{tracer.writer.node_of(args[0]).name}: {TensorSpec.of(tracer.fakes.unwrap(args[0]))}>"


def _hash(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return id(args[0])


def _numpy(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise tracer.writer.error("the tensor leaves torch for NumPy, where it cannot be followed")


METHODS: dict[str, Query] = {
    "size": _size,
    "dim": _rank,
    "ndimension": _rank,
    "numel": _numel,
    "nelement": _numel,
    "__len__": _length,
    "__bool__": _bool,
    "__int__": _int,
    "__index__": _int,
    "__float__": _float,
    "tolist": _to_list,
    "item": _item,
    "__contains__": _contains,
    "__repr__": _repr,
    "__format__": _repr,
    "__hash__": _hash,
    "numpy": _numpy,
    "__array__": _numpy,
    **dict.fromkeys(
        (
            "is_contiguous",
            "is_floating_point",
            "is_complex",
            "is_signed",
            "element_size",
            "stride",
            "storage_offset",
            "get_device",
            "is_inference",
        ),
        _layout,
    ),
}
