"""The torch function that was called, as an fx node: its op, target and arguments.

What a model writes in several ways gets one form: ``x + y``, ``x.add(y)`` and ``y.__radd__(x)``
all become ``operator.add``. Everything else keeps the form it had: a tensor method is a
``call_method``, a function a ``call_function``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from surgery.capture import private
from surgery.capture.signs import ARITHMETIC, COMPARISON, UNARY


class Op(NamedTuple):
    """An fx op and target, and the positional arguments in the order the target takes them."""

    kind: str
    target: Callable[..., Any] | str
    args: tuple[Any, ...]


# What the methods of a tensor are called, beyond the names of Python's own operators.
_INFIX: dict[str, Callable[..., Any]] = {
    **ARITHMETIC,
    **COMPARISON,
    "div": ARITHMETIC["truediv"],
    "true_divide": ARITHMETIC["truediv"],
    "floor_divide": ARITHMETIC["floordiv"],
    "remainder": ARITHMETIC["mod"],
    "getitem": operator.getitem,
}
_REFLECTED: dict[str, Callable[..., Any]] = {
    "rdiv": ARITHMETIC["truediv"],
    **{f"r{name}": function for name, function in ARITHMETIC.items()},
}
_INPLACE: dict[str, str] = {
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "itruediv": "div_",
    "idiv": "div_",
    "ifloordiv": "floor_divide_",
    "imod": "remainder_",
    "ipow": "pow_",
    "iand": "bitwise_and_",
    "ior": "bitwise_or_",
    "ixor": "bitwise_xor_",
}
_PREFIX: dict[str, Callable[..., Any]] = {
    "neg": UNARY["neg"],
    **{f"__{name}__": function for name, function in UNARY.items()},
}


def resolve(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
    """The fx form of a call that ``__torch_function__`` was handed."""
    if not is_method(func):
        return Op("call_function", func, args)
    name: str = func.__name__
    plain = name.strip("_") if name.startswith("__") else name
    if len(args) == 2 and not kwargs:
        if plain in _INFIX:
            return Op("call_function", _INFIX[plain], args)
        if plain in _REFLECTED:
            return Op("call_function", _REFLECTED[plain], (args[1], args[0]))
        if plain in _INPLACE:
            return Op("call_method", _INPLACE[plain], args)
    if name == "__setitem__":
        return Op("call_function", operator.setitem, args)
    if len(args) == 1 and name in _PREFIX:
        return Op("call_function", _PREFIX[name], args)
    return Op("call_method", name, args)


def is_method(func: Any) -> bool:
    """True for a method of ``torch.Tensor``, given as the unbound function."""
    owner = getattr(func, "__qualname__", "").rpartition(".")[0]
    return owner in ("Tensor", "TensorBase")


def attribute(func: Any) -> tuple[str, str] | None:
    """``("get" | "set", name)`` for the accessor of a tensor attribute such as ``Tensor.shape``."""
    kind = getattr(func, "__name__", "")
    if kind not in ("__get__", "__set__", "__delete__"):
        return None
    name = getattr(getattr(func, "__self__", None), "__name__", None)
    return None if name is None else (kind.strip("_"), name)


def mutates(func: Any, kwargs: dict[str, Any]) -> bool:
    """True when the call writes to its first argument or to ``out``."""
    name = getattr(func, "__name__", "")
    if name in ("__setitem__", "__delitem__") or kwargs.get("out") is not None:
        return True
    if private.is_operator(func):
        return private.writes_arguments(func)
    trailing = name.endswith("_") and not name.endswith("__")
    inplace = name.startswith("__i") and name.strip("_") in _INPLACE
    return trailing or inplace or kwargs.get("inplace") is True
