"""What was asked of ``load``, checked before any library is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from surgery.errors import SourceError
from surgery.registry import suggest
from surgery.sources.skeleton import parameters_on_meta

# JSON has no infinity and no NaN; transformers tags them in the same way.
_FLOAT = "__float__"


@dataclass(frozen=True)
class Request:
    """The arguments of one ``load``.

    Attributes:
        config: Overrides of the architecture's configuration.
        pretrained: Whether weights are loaded.
        device: Where the model is to be.
        dtype: Floating dtype; None leaves the library's own choice.
        variant: Variant of the weight files, such as ``fp16``.
        allow_missing: Whether keys may keep their random initialisation.
        allow_unexpected: Whether keys of the checkpoint may have no place in the model.
        skeleton: Whether the model gets no weights, on the meta device, but is otherwise as if it
            had been loaded, with true buffers; ``device`` is the CPU then.
        stored_dtype: Floating dtype of the checkpoint, for a skeleton.
    """

    config: dict[str, Any]
    pretrained: bool
    device: torch.device
    dtype: torch.dtype | None
    variant: str | None = None
    allow_missing: bool = False
    allow_unexpected: bool = False
    skeleton: bool = False
    stored_dtype: torch.dtype | None = None

    @property
    def names_weights(self) -> bool:
        """Whether the weight files of a saved model are looked for."""
        return self.pretrained and self.device.type != "meta"

    @contextmanager
    def building(self) -> Generator[None]:
        """Where tensors are while the model is built."""
        place = torch.device("meta" if self.device.type == "meta" else "cpu")
        with place:
            if not self.skeleton:
                yield
                return
            with parameters_on_meta():
                yield

    def placed(self, model: nn.Module) -> nn.Module:
        """The model where it is to be; a skeleton is there already."""
        return model if self.skeleton else model.to(self.device)


def as_device(device: str | torch.device | None) -> torch.device:
    """``device`` as a torch.device; None is the CPU.

    Raises:
        SourceError: torch knows no such device, or it is not there.
    """
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise SourceError(f"device={device!r}: {error}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SourceError(
            f"device={str(found)!r}, but {torch.cuda.device_count()} CUDA devices are visible"
        )
    return found


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``dtype`` as a torch.dtype, from a name such as "bfloat16" or "torch.bfloat16".

    Raises:
        SourceError: it is no floating dtype.
    """
    if dtype is None:
        return None
    named = isinstance(dtype, str)
    found = FLOATING.get(dtype.removeprefix("torch.")) if named else dtype
    if found is None or not found.is_floating_point:
        raise SourceError(
            f"dtype={dtype!r}: expected a floating dtype", hint=suggest(str(dtype), FLOATING)
        )
    return found


FLOATING: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def as_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Overrides, each checked to be recordable so that the model can be rebuilt from them.

    Raises:
        SourceError: a value cannot be written as JSON.
    """
    checked = {str(key): value for key, value in (config or {}).items()}
    for key, value in checked.items():
        jsonable(value, f"config: {key}")
    return checked


def jsonable(value: Any, where: str) -> Any:
    """``value`` with tuples as lists, dtypes as names, and infinity as ``{"__float__": "inf"}``.

    Raises:
        SourceError: there is anything in it that JSON cannot hold.
    """
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {_key(key, where): jsonable(item, where) for key, item in items}
    if isinstance(value, (list, tuple)):
        return [jsonable(item, where) for item in cast("list[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(item, where) for item in cast("set[Any]", value))
    try:
        json.dumps(value)
    except TypeError:
        raise SourceError(
            f"{where} is {value!r}, which cannot be recorded",
            hint="pass its name if the library takes one; otherwise build the model with the "
            "library itself and pass the module to surgery.plan",
        ) from None
    return value


def from_json(value: Any) -> Any:
    """The value that ``jsonable`` was given, but for its lists and names."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        if set(items) == {_FLOAT}:
            return float(items[_FLOAT])
        return {key: from_json(item) for key, item in items.items()}
    if isinstance(value, list):
        return [from_json(item) for item in cast("list[Any]", value)]
    return value


def _key(key: Any, where: str) -> Any:
    if isinstance(key, (str, int)):
        return key
    raise SourceError(f"{where}: {key!r} cannot be a key")
