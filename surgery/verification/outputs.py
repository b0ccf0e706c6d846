"""Every tensor of a structured output under a path, and how two of them compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OPAQUE = (nn.Module, type, FunctionType, MethodType, ModuleType, torch.dtype, torch.device)


def leaves(output: object) -> dict[str, Any]:
    """Path → tensor or plain value, for mappings, sequences, dataclasses and other objects.

    Of other objects, such as the key-value caches of transformers, the tensors among their
    attributes are taken.
    """
    return dict(_leaves(output, "", set()))


def _leaves(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield path or "output", value
        return
    if isinstance(value, _PLAIN):
        yield path or "output", value
        return
    if isinstance(value, _OPAQUE) or id(value) in above:
        return
    inside = above | {id(value)}
    for name, item in _items(value):
        yield from _leaves(item, _join(path, name), inside)


def _items(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[object, Any]", value).items():
            yield (key if isinstance(key, str) else f"[{key!r}]"), item
    elif isinstance(value, Sequence):
        names = getattr(cast("object", value), "_fields", None)  # a named tuple
        for index, item in enumerate(cast("Sequence[Any]", value)):
            yield (f"[{index}]" if names is None else names[index]), item
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield field.name, value.__dict__.get(field.name)
    else:
        for name, item in cast("dict[str, Any]", getattr(value, "__dict__", {})).items():
            if not isinstance(item, _PLAIN):
                yield name, item


def _join(path: str, name: str) -> str:
    return f"{path}{name}" if name.startswith("[") or not path else f"{path}.{name}"


@dataclass(frozen=True)
class Deviation:
    """How far two tensors, or two sets of them, are apart.

    Attributes:
        worst: The largest absolute deviation; infinite where one is not finite and the other is,
            or where they cannot be compared.
        where: Path and index of the worst element.
        excess: The largest factor by which an element passes its bound; at most 1 is within.
        detail: Why they cannot be compared, if so.
    """

    worst: float = 0.0
    where: str | None = None
    excess: float = 0.0
    detail: str = ""

    @property
    def equal(self) -> bool:
        """Whether there is no deviation at all."""
        return self.where is None

    def beyond(self, other: Deviation) -> bool:
        """Whether this is the worse of two."""
        return (self.excess, self.worst) > (other.excess, other.worst)


def compare(
    base: Mapping[str, Any], new: Mapping[str, Any], *, rtol: float, atol: float
) -> Deviation:
    """The worst deviation between two sets of leaves.

    Values that are not finite must be the same ones in the same places.
    """
    if list(base) != list(new):
        odd = next(iter(set(base) ^ set(new)), next(iter(new), "output"))
        side = "only the original has it" if odd in base else "only the rewritten model has it"
        return Deviation(math.inf, odd, math.inf, f"another structure: {side}")
    found = Deviation()
    for path in base:
        one = _compare_leaf(path, base[path], new[path], rtol, atol)
        if one.beyond(found) or (found.equal and not one.equal):
            found = one
    return found


def _compare_leaf(path: str, base: Any, new: Any, rtol: float, atol: float) -> Deviation:
    if isinstance(base, Tensor) and isinstance(new, Tensor):
        return compare_tensors(path, base, new, rtol=rtol, atol=atol)
    if type(base) is type(new) and (base == new or _both_nan(base, new)):
        return Deviation()
    return Deviation(math.inf, path, math.inf, f"{base!r} became {new!r}")


def _both_nan(base: Any, new: Any) -> bool:
    return isinstance(base, float) and math.isnan(base) and math.isnan(new)


def compare_tensors(path: str, base: Tensor, new: Tensor, *, rtol: float, atol: float) -> Deviation:
    """How far ``new`` is from ``base``; each element may deviate by ``atol + rtol · |base|``."""
    if (base.shape, base.dtype) != (new.shape, new.dtype):
        was, now = (f"{t.dtype} {tuple(t.shape)}" for t in (base, new))
        return Deviation(math.inf, path, math.inf, f"{was} became {now}")
    base, new = _dense(base), _dense(new)
    if torch.equal(base, new):
        return Deviation()
    old, now = _wide(base), _wide(new)
    same = (old == now) | (old.isnan() & now.isnan())
    if bool(same.all()):
        return Deviation()
    difference = torch.where(same, 0.0, (now - old).abs())
    difference = difference.nan_to_num(nan=math.inf, posinf=math.inf)
    bound = (atol + rtol * old.abs()).nan_to_num(posinf=0.0)
    excess = torch.where(same, 0.0, difference / bound)
    index = int(excess.argmax()) if bool(excess.isfinite().any()) and rtol + atol else None
    index = int(difference.argmax()) if index is None else index
    place = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(index), old.shape))
    worst = float(difference.flatten()[index])
    return Deviation(worst, f"{path}[{place}]", float(excess.flatten()[index]))


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj()).double()
    return tensor.detach().double()


def not_finite(tensor: Tensor, *, nan_only: bool = False) -> tuple[int, str] | None:
    """How many elements are NaN or infinite, and the index of the first; None if none is.

    Args:
        tensor: Any tensor; integers are always finite.
        nan_only: Whether infinity is all right, as in a mask.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    values = _dense(tensor.detach())
    if values.element_size() == 1:
        values = values.float()  # torch has no isfinite for 8-bit floats
    wrong = values.isnan() if nan_only else ~values.isfinite()
    count = int(wrong.sum())
    if count == 0:
        return None
    first = torch.unravel_index(wrong.flatten().int().argmax(), wrong.shape)
    return count, "[" + ", ".join(str(int(i)) for i in first) + "]"
