"""Forwards that take more than the module's own inputs, grafted onto the module.

A block whose residuals are rewired needs what earlier blocks computed, and hands on what it
computes itself. Its callers pass that along as positional tensors behind a marker::

    result, *new = layer(hidden, mask, RELAY, coefficients, *states, use_cache=True)

Positional, since a re-entrant checkpoint sees nothing else; behind a marker, since a block may be
called with any number of its own arguments. A call without the marker is an error: run as it was
written, the block would silently lose what the rewrite is for.
"""

from __future__ import annotations

import enum
import hashlib
import threading
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import nn

from surgery.capture.beneath import forward_beneath
from surgery.capture.graft import Generated, grafts, stock_class
from surgery.capture.own import Capture
from surgery.capture.variants import Edit, Forward
from surgery.errors import CaptureError
from surgery.tree import named_modules


class Relay(enum.Enum):
    """Stands before the extra inputs among the positional arguments of a call."""

    MARKER = "relay"


RELAY = Relay.MARKER


class Rewired(Generated):
    """Base of the generated mixins; one class for all modules of one source.

    What a class defines hides children of that name, so these are names that no module has.

    Attributes:
        surgery_shared: The forward, with the variants of all modules that carry the class.
        surgery_key: What tells this class from others, the same in every process.
        surgery_edit: What was done to the captures; hashable and picklable.
        surgery_inline: The children whose forwards are part of it.
    """

    surgery_shared: ClassVar[Forward]
    surgery_key: ClassVar[str]
    surgery_edit: ClassVar[Edit]
    surgery_inline: ClassVar[tuple[str, ...]]

    @classmethod
    def recipe(cls) -> tuple[Any, tuple[Any, ...]]:
        """What `rewired_class` makes this class from."""
        return rewired_class, (
            cls.__name__,
            cls.surgery_key,
            cls.surgery_edit,
            cls.surgery_inline,
        )


def forward_mixin(name: str, first: Capture, module: nn.Module, edit: Edit) -> type[Rewired]:
    """The class to graft onto ``module`` so that its forward is the edited capture.

    Modules whose captures have the same source, and whose edits are equal, get the same class.

    Args:
        name: What the class is called.
        first: A capture of the module's forward, unedited.
        module: The module, not grafted yet.
        edit: Done to ``first`` and to every later capture. Hashable, and picklable if the module
            is to be: an instance of a frozen dataclass.

    Raises:
        CaptureError: the edit cannot be done.
    """
    made = rewired_class(name, _key(first, module), edit, first.inline)
    made.surgery_shared.add(edit(first, module))
    return made


def rewired_class(name: str, key: str, edit: Edit, inline: tuple[str, ...]) -> type[Rewired]:
    """The class of this key and edit; a new one captures at its first call."""
    with _lock:
        found = _classes.get((name, key, edit))
        if found is None:
            found = _make_class(name, key, edit, inline)
            _classes[name, key, edit] = found
        return found


def code_of(module: nn.Module) -> str:
    """The generated Python that a module's rewired forward runs, all its variants.

    Empty where the forward is not a generated one, or has not been captured yet.
    """
    mixins = [mixin for mixin in grafts(module) if issubclass(mixin, Rewired)]
    return "\n\n".join(
        variant.source for mixin in mixins for variant in mixin.surgery_shared.variants
    )


_lock = threading.Lock()
_classes: dict[tuple[str, str, Edit], type[Rewired]] = {}


def _make_class(name: str, key: str, edit: Edit, inline: tuple[str, ...]) -> type[Rewired]:
    def beneath(module: nn.Module) -> Any:
        return forward_beneath(type(module), made)

    shared = Forward(edit=edit, inline=inline, function=beneath)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for position, value in enumerate(args):
            if value is RELAY:
                extra = args[position + 1 :]
                return shared(self, *args[:position], extra=extra, **kwargs)
        raise CaptureError(
            f"a rewired block ({type(self).__name__}) was called outside of its stack, without "
            "the states of the blocks before it",
            hint="call the model that the block is part of, or surgery.undo it first",
        )

    names = {
        "forward": forward,
        "surgery_shared": shared,
        "surgery_key": key,
        "surgery_edit": edit,
        "surgery_inline": inline,
        "__module__": __name__,
    }
    made = cast("type[Rewired]", type(name, (Rewired,), names))
    return made


# -- what two modules must have in common to share a class ---------------------------------------


def _key(first: Capture, module: nn.Module) -> str:
    """A digest of the source, of what its names mean, and of the module's structure."""
    digest = hashlib.sha256(first.source.encode())
    for name, value in sorted(first.code.names.items()):
        digest.update(f"\n{name} ".encode())
        digest.update(_identity(value))
    for line in _structure(first, module):
        digest.update(f"\n{line}".encode())
    return digest.hexdigest()


def _identity(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        described = f"{value.dtype} {tuple(value.shape)} {value.device}".encode()
        return described + _contents(value)
    qualified = getattr(value, "__qualname__", None)
    if qualified is not None and "<" not in qualified:
        return f"{value.__module__}.{qualified}".encode()
    return f"{type(value).__qualname__} {value!r}".encode()


def _contents(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        return str(id(tensor)).encode()
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _structure(first: Capture, module: nn.Module) -> Iterator[str]:
    """The classes of everything in the module, and which of its slots are empty."""
    cls = stock_class(module)
    yield f"{cls.__module__}.{cls.__qualname__}"
    yield from (f"{mixin.__module__}.{mixin.__qualname__}" for mixin in grafts(module))
    for path, child in named_modules(module):
        kind = stock_class(child)
        yield f"{path}: {kind.__module__}.{kind.__qualname__}"
        slots: dict[str, Any] = {**child._parameters, **child._modules}  # pyright: ignore[reportPrivateUsage]
        yield ",".join(name for name, held in slots.items() if held is None)
