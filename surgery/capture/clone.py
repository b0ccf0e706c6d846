"""A stand-in for a module tree that a trace may scribble on.

Forwards write to their modules: attention-bias caches, ``self.training``, step counters. The
trace runs on clones, which share every parameter, buffer and plain object with the original
but own their attribute dictionaries and the containers in them. The model itself is never
touched, so other threads may go on using it.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from surgery.capture import private
from surgery.capture.structure import class_of
from surgery.tree import named_modules

_CONTAINERS = (list, tuple, dict, set, OrderedDict, defaultdict, deque)


class Clones:
    """Clones of ``root`` and every module under it.

    Args:
        root: The module to stand in for.
        keep_caches: Keep tensors in the plain dicts of a module. They are usually computed from
            parameters and kept for later, and a trace that read them would lose the connection.

    Attributes:
        root: The clone of the root module.
        path: ``id`` of a clone → dotted path of its original, the first of a shared module's.
        original: ``id`` of a clone → the original module.
    """

    def __init__(self, root: nn.Module, *, keep_caches: bool = False) -> None:
        self._keep_caches = keep_caches
        self._clone_of: dict[int, nn.Module] = {}
        self.path: dict[int, str] = {}
        self.original: dict[int, nn.Module] = {}
        pairs: list[tuple[nn.Module, nn.Module]] = []
        for path, module in named_modules(root, duplicates=False):
            clone = object.__new__(type(module))
            self._clone_of[id(module)] = clone
            self.path[id(clone)] = path
            self.original[id(clone)] = module
            pairs.append((module, clone))
        for module, clone in pairs:
            clone.__dict__.update(self._state(module))
        self.root = self._clone_of[id(root)]
        self.original_root = root

    def _state(self, module: nn.Module) -> dict[str, Any]:
        """The module's attributes, with the plain dicts it caches tensors in emptied."""
        return {
            key: {} if self._is_cache(key, value) else self._copy(value)
            for key, value in module.__dict__.items()
        }

    def _is_cache(self, name: str, value: Any) -> bool:
        if self._keep_caches or type(value) is not dict or name in _REGISTRIES:
            return False
        items = cast(dict[Any, Any], value).values()
        return any(isinstance(item, torch.Tensor) for item in items)

    def pair(self, path: str) -> tuple[nn.Module, nn.Module]:
        """The clone at a path and the module it stands for."""
        return self.root.get_submodule(path), self.original_root.get_submodule(path)

    def by_path(self) -> list[tuple[str, nn.Module]]:
        """Every clone with its path."""
        return [(self.path[id(clone)], clone) for clone in self._clone_of.values()]

    def at(self, paths: set[str]) -> list[tuple[str, nn.Module]]:
        """The clones at these paths."""
        return [(path, clone) for path, clone in self.by_path() if path in paths]

    def of(self, module: nn.Module) -> nn.Module:
        """The clone of a module of the tree."""
        return self._clone_of[id(module)]

    def modules(self) -> list[nn.Module]:
        """Every clone."""
        return list(self._clone_of.values())

    def path_of(self, value: object) -> str | None:
        """How to reach an object from the root: a module, or what one holds; None if none does."""
        if id(value) in self.path:
            return self.path[id(value)]
        for clone in self._clone_of.values():
            for name, held in clone.__dict__.items():
                if held is value and not name.startswith("__"):
                    prefix = self.path[id(clone)]
                    return f"{prefix}.{name}" if prefix else name
        return None

    def intercept(self, clone: nn.Module, handler: Callable[..., Any]) -> None:
        """Send calls of ``clone`` to ``handler``, also where its class overrides ``__call__``."""
        private.intercept_calls(clone, handler)
        if type(clone).__call__ is not nn.Module.__call__:
            clone.__class__ = _with_interception(type(clone))

    def _copy(self, value: Any) -> Any:
        kind = class_of(value)
        if kind in _ATOMS:
            return value
        if kind in _CONTAINERS:
            return self._copy_container(value)
        if isinstance(value, nn.Module):
            return self._clone_of.get(id(value), value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self._copy(value.__self__))
        if kind is functools.partial:
            return self._copy_partial(value)
        if kind is types.FunctionType and value.__closure__ is not None:
            return self._copy_closure(value)
        return value

    def _copy_container(self, value: Any) -> Any:
        kind = class_of(value)
        if not issubclass(kind, dict):
            return kind(self._copy(item) for item in value)
        made = value.copy()  # keeps the default factory of a defaultdict
        made.update((key, self._copy(item)) for key, item in value.items())
        return made

    def _copy_partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        arguments = [self._copy(item) for item in value.args]
        keywords = {key: self._copy(item) for key, item in value.keywords.items()}
        made = functools.partial(self._copy(value.func), *arguments, **keywords)
        made.__dict__.update({key: self._copy(item) for key, item in value.__dict__.items()})
        return made

    def _copy_closure(self, value: types.FunctionType) -> Callable[..., Any]:
        """An instance's own forward may hold the module in its closure."""
        cells = cast(tuple[types.CellType, ...], value.__closure__)
        contents = [cell.cell_contents for cell in cells]
        copied = [self._copy(item) for item in contents]
        if all(new is old for new, old in zip(copied, contents, strict=True)):
            return value
        closure = tuple(types.CellType(item) for item in copied)
        made = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, closure
        )
        made.__kwdefaults__ = value.__kwdefaults__
        made.__dict__.update(value.__dict__)
        return made


@functools.cache
def _with_interception(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose calls go to the handler first, and to its own ``__call__`` from there."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handler = self.__dict__["_compiled_call_impl"]
        return handler.outer(functools.partial(cls.__call__, self), args, kwargs)

    names = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names)


_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})
_ATOMS = frozenset({int, float, bool, str, bytes, type(None), type})
