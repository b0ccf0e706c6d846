"""The calls a captured forward is right for: which arguments are tensors, None, or fixed values."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from surgery.capture.statics import is_static
from surgery.capture.structure import class_of
from surgery.capture.values import SYMBOLS


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor with this many dimensions."""

    rank: int

    def __str__(self) -> str:
        return f"tensor, {self.rank} dimensions"


@dataclasses.dataclass(frozen=True)
class Number:
    """An int or a float, of any value."""

    kind: type

    def __str__(self) -> str:
        return self.kind.__name__


@dataclasses.dataclass(frozen=True)
class Static:
    """Exactly this value: None, a flag, a string, a dtype."""

    value: Any

    def __str__(self) -> str:
        return repr(self.value)


@dataclasses.dataclass(frozen=True)
class Items:
    """A tuple or list of these."""

    kind: type
    items: tuple[Spec, ...]

    def __str__(self) -> str:
        return f"{self.kind.__name__}({', '.join(map(str, self.items))})"


@dataclasses.dataclass(frozen=True)
class Keyed:
    """A dict with these keys."""

    items: tuple[tuple[Any, Spec], ...]

    def __str__(self) -> str:
        return f"{{{', '.join(f'{key!r}: {spec}' for key, spec in self.items)}}}"


@dataclasses.dataclass(frozen=True)
class Instance:
    """Some object of exactly this class, such as a cache."""

    kind: type

    def __str__(self) -> str:
        return self.kind.__name__


Spec = Tensor | Number | Static | Items | Keyed | Instance


@dataclasses.dataclass(frozen=True)
class Signature:
    """A forward's parameters and what each one was at the call that was captured.

    Attributes:
        parameters: The parameters of the forward, without ``self``.
        specs: What each one has to be; by parameter name.
        autocast: The autocast state around the call, per device type.
    """

    parameters: tuple[inspect.Parameter, ...]
    specs: dict[str, Spec]
    autocast: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(f"{name}: {spec}" for name, spec in self.specs.items())


_SEQUENCES: tuple[type[Any], ...] = (tuple, list)


def spec_of(value: Any) -> Spec:
    """What an argument is, as far as a captured graph depends on it."""
    kind = class_of(value)
    if isinstance(value, torch.Tensor):
        return Tensor(value.ndim)
    if kind in SYMBOLS and kind is not bool:
        return Number(kind)
    if issubclass(kind, _SEQUENCES):
        return Items(kind, tuple(spec_of(item) for item in value))
    if kind is dict:
        return Keyed(tuple((key, spec_of(item)) for key, item in value.items()))
    return Static(value) if is_static(value) else Instance(kind)


def bind(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """The arguments by parameter name; those that are left out are not in it."""
    return inspect.signature(forward).bind(*args, **kwargs)


def call_form(
    bound: inspect.BoundArguments,
    values: dict[str, Any],
    positional: int,
    keywords: Iterable[str],
) -> tuple[list[Any], dict[str, Any]]:
    """``values``, by parameter name, in the form of the call that was bound.

    A wrapper around a forward may tell ``f(x, None)`` from ``f(x, mask=None)``.
    """
    args: list[Any] = []
    rest: dict[str, Any] = {}
    for name in bound.arguments:
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(values[name])
        elif kind is inspect.Parameter.VAR_KEYWORD:
            rest = values[name]
        elif len(args) < positional:
            args.append(values[name])
    return args, {name: rest[name] if name in rest else values[name] for name in keywords}


def binder(parameters: tuple[inspect.Parameter, ...]) -> Callable[..., tuple[Any, ...]]:
    """A function with these parameters that gives their values in order."""
    names: dict[str, Any] = {}
    plain = [_without_annotation(parameter, names) for parameter in parameters]
    inner = ", ".join(parameter.name for parameter in parameters)
    header = str(inspect.Signature(plain))
    text = f"def bind{header}:\n    return ({inner}{',' if inner else ''})\n"
    exec(compile(text, "<surgery bind>", "exec"), names)  # noqa: S102  a text made just above
    return names["bind"]


def _without_annotation(parameter: inspect.Parameter, names: dict[str, Any]) -> inspect.Parameter:
    plain = parameter.replace(annotation=inspect.Parameter.empty)
    if parameter.default is inspect.Parameter.empty:
        return plain
    names[f"_default_{parameter.name}"] = parameter.default
    return plain.replace(default=_Name(f"_default_{parameter.name}"))


class _Name:
    """Prints as a bare name, so that a signature's text refers to a default by it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name
