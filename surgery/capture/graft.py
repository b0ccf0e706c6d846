"""Change a module's class in place, keeping everything else about the object.

A rewritten module must still be the library's own object: same identity, same parameters,
same names, ``isinstance`` of its class, picklable. So instead of replacing it, ``graft``
points its ``__class__`` at a dynamic subclass ``(mixin, stock class)`` which bears the name
of the stock class. Grafts of the same mixins on the same class share one dynamic class, hence
one code object: ``torch.compile`` compiles it once however many instances there are.
"""

from __future__ import annotations

import copyreg
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from surgery.errors import ModelStateError

MARK = "__surgery__"


class Generated:
    """Base of mixins made at run time, which pickle cannot import: they say how they are made."""

    @classmethod
    def recipe(cls) -> tuple[Callable[..., type], tuple[Any, ...]]:
        """An importable function and the arguments from which it makes this class again."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Recipe:
    """Stands for a `Generated` mixin in a pickle."""

    make: Callable[..., type]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Mark:
    """What a dynamic class is made of: the stock class and the mixins over it, outermost first."""

    base: type[nn.Module]
    mixins: tuple[type, ...]


_lock = threading.Lock()
_classes: dict[Mark, type[nn.Module]] = {}


def mark(module: nn.Module) -> Mark | None:
    """The graft a module carries, looking through subclasses made by others (FSDP2), or None."""
    for cls in type(module).__mro__:
        found = cls.__dict__.get(MARK)
        if found is not None:
            return cast("Mark", found)
    return None


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before any graft."""
    found = mark(module)
    return type(module) if found is None else found.base


def grafts(module: nn.Module) -> tuple[type, ...]:
    """The mixins grafted onto a module, outermost first."""
    found = mark(module)
    return () if found is None else found.mixins


def graft(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` over the module's class, in place.

    Args:
        module: Keeps its identity, its parameters and its place in its parents.
        mixin: An importable class, or a `Generated` one, whose methods call ``super()``. One that
            derives from an ancestor of the module's class goes right above that ancestor instead
            of on top.

    Raises:
        ModelStateError: the mixin is there already, or the instance has a ``forward`` of its
            own that would hide the grafted one.
    """
    present = _own_mark(module)
    if mixin in present.mixins:
        raise ModelStateError(
            f"{present.base.__name__} already carries {mixin.__name__}",
            hint="undo the earlier rewrite first",
        )
    _assign(module, Mark(present.base, (mixin, *present.mixins)))


def ungraft(module: nn.Module, mixin: type) -> None:
    """Take ``mixin`` off again.

    Raises:
        ModelStateError: the module does not carry it, or its class was changed since.
    """
    present = _own_mark(module)
    if mixin not in present.mixins:
        raise ModelStateError(f"{present.base.__name__} does not carry {mixin.__name__}")
    rest = tuple(kept for kept in present.mixins if kept is not mixin)
    _assign(module, Mark(present.base, rest))


def check_graftable(module: nn.Module, path: str) -> None:
    """Raise what ``graft`` would raise, naming the module's path.

    Raises:
        ModelStateError: the class was changed since the last graft, or an instance-level
            ``forward`` hides the class's.
    """
    try:
        _own_mark(module)
        _hooked_forward(module)
    except ModelStateError as error:
        raise ModelStateError(f"{path}: {error.message}", hint=error.hint) from None


def _own_mark(module: nn.Module) -> Mark:
    """The mark of the module's very class; a subclass of a graft was made by somebody else."""
    own = type(module).__dict__.get(MARK)
    if own is not None:
        return cast("Mark", own)
    if mark(module) is not None:
        raise ModelStateError(
            f"the class of this module became {type(module).__name__} after it was rewritten",
            hint="unwrap what was put over it (fully_shard, parametrize) and try again",
        )
    return Mark(type(module), ())


def _assign(module: nn.Module, wanted: Mark) -> None:
    hooked = _hooked_forward(module)
    cls = wanted.base if not wanted.mixins else _dynamic_class(wanted)
    module.__class__ = cls
    if hooked:
        # accelerate calls the forward it saved, which is bound to the class of that time.
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)


def _hooked_forward(module: nn.Module) -> bool:
    """Whether accelerate's hook wraps the class's forward; any other instance forward raises."""
    if "forward" not in module.__dict__:
        return False
    saved = module.__dict__.get("_old_forward")
    if isinstance(saved, types.MethodType) and saved.__func__ is type(module).forward:
        return True
    raise ModelStateError(
        f"this {type(module).__name__} has a forward of its own on the instance, which would "
        "hide a rewritten one",
        hint="rewrite the model first, then wrap or patch its forward",
    )


def _dynamic_class(wanted: Mark) -> type[nn.Module]:
    with _lock:
        if wanted not in _classes:
            _classes[wanted] = _make_class(wanted)
        return _classes[wanted]


def _make_class(wanted: Mark) -> type[nn.Module]:
    base = wanted.base
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        MARK: wanted,
    }
    return types.new_class(
        base.__name__,
        _bases(wanted),
        {"metaclass": type(base)},
        lambda body: body.update(namespace),
    )


def _bases(wanted: Mark) -> tuple[type, ...]:
    """Mixins above the class, save those derived from one of its proper ancestors.

    Those come after it, which puts them right above that ancestor: the class's own methods run
    first and reach the mixin's through ``super()``.
    """
    base = wanted.base
    inner = [
        mixin
        for mixin in wanted.mixins
        if issubclass(mixin, nn.Module) and not issubclass(mixin, base)
    ]
    outer = [mixin for mixin in wanted.mixins if mixin not in inner]
    return (*outer, base, *inner)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    found = cast("Mark", mark(self))
    make, args, *state = super(type(self), self).__reduce_ex__(protocol)
    if make is not copyreg.__newobj__ or args != (type(self),):  # type: ignore[attr-defined]
        raise ModelStateError(
            f"{found.base.__name__} pickles itself in a way of its own, which a rewritten "
            "instance cannot follow",
            hint="save it with surgery.save",
        )
    return (_rebuild, (found.base, tuple(map(_portable, found.mixins))), *state)


def _portable(mixin: Any) -> type | _Recipe:
    if not issubclass(mixin, Generated):
        return mixin
    make, args = mixin.recipe()
    return _Recipe(make, args)


def _rebuild(base: type[nn.Module], mixins: tuple[type | _Recipe, ...]) -> nn.Module:
    found = tuple(
        mixin.make(*mixin.args) if isinstance(mixin, _Recipe) else mixin for mixin in mixins
    )
    return base.__new__(_dynamic_class(Mark(base, found)))
