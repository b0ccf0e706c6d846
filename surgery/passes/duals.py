"""Modules whose parameters are duals: whoever reads one gets what a mirror map makes of it.

The parameter itself stays where it was, under its own name: it is what ``parameters()`` gives,
what a state dict holds and what an optimizer steps on. Reading it as an attribute, as every
forward does, gives ``T(z)``. Nothing is kept on a module between calls: what was computed in a
forward is remembered in a context variable until that forward ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from architectures.mirror import MirrorMap
from surgery.capture.graft import Generated, check_graftable, graft, grafts, stock_class, ungraft
from surgery.copies import is_sharded
from surgery.errors import ModelStateError
from surgery.passes.hosts import Family, below, without_caches
from surgery.passes.hosts.bank import COMPILER_SEES_CONTEXT
from surgery.passes.hosts.branch import autocasting
from surgery.passes.links import LINKS, MAPS, links_of
from surgery.passes.names import check_name
from surgery.passes.streams import cover, uncover
from surgery.tree import children, named_modules, own_parameters

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

# (dual, whether gradients are on) → the dual, kept alive, and its value, while a forward runs.
_Memo = dict[tuple[int, bool], tuple[Tensor, Tensor]]
_memo: ContextVar[_Memo | None] = ContextVar("surgery_mirrored", default=None)
# Numbers of the attachments whose parameters are read as they are.
_unmapped: ContextVar[frozenset[int]] = ContextVar("surgery_unmapped", default=frozenset())


class Mirrors(nn.Module):
    """The maps of a module, by the parameter they map, or by number where they map several.

    ``fc.mirror.weight`` maps ``fc.weight``, and ``mirror.0`` of the root several parameters.
    """


@dataclass(frozen=True, eq=False)
class Attachment:
    """One map and the parameters that it maps.

    Attributes:
        map: The map.
        members: Module and name of each parameter, in the order of the map's tensors.
        family: Tells the attachments of copies apart.
    """

    map: MirrorMap
    members: tuple[tuple[nn.Module, str], ...]
    family: Family = field(default_factory=Family)

    def duals(self) -> list[Tensor]:
        """The parameters as they are, or what ``functional_call`` put in their place."""
        return [
            cast("Tensor", module.__dict__["_parameters"][name]) for module, name in self.members
        ]

    def read(self, index: int, dual: Tensor) -> Tensor:
        """The value that reading the parameter of a number gives."""
        if self._is_off():
            return dual
        if torch.compiler.is_compiling():
            # The compiler merges repeated computations; a context variable cannot be set there.
            return mapped(self.map, self.duals(), only=index)[0]
        memo = _memo.get()
        if memo is None:
            return mapped(self.map, self.duals(), only=index)[0]
        graded = torch.is_grad_enabled()
        known = memo.get((id(dual), graded))
        if known is not None:
            return known[1]
        duals = self.duals()
        values = mapped(self.map, duals)
        memo.update({(id(z), graded): (z, v) for z, v in zip(duals, values, strict=True)})
        return values[index]

    def _is_off(self) -> bool:
        if not COMPILER_SEES_CONTEXT and torch.compiler.is_compiling():
            return False  # ``unmapped`` then runs without the compiler
        return self.family.number in _unmapped.get()


Links = Mapping[str, tuple[Attachment, int]]


def mapped(of: MirrorMap, duals: Sequence[Tensor], *, only: int | None = None) -> Sequence[Tensor]:
    """What a map makes of duals, computed in the dtype of its parameters, in the dtype of each.

    Args:
        of: The map.
        duals: Its tensors.
        only: The number of the one that is wanted; all of them by default.

    Raises:
        ModelStateError: a dual is sharded over processes at the moment.
    """
    if any(is_sharded(cast("nn.Parameter", dual)) for dual in duals):
        raise ModelStateError(
            "a mirror map needs its parameters whole, and one is a shard of another process's",
            hint="shard the modules that a map couples as one (fully_shard on their common "
            "parent alone), or use a map that takes each parameter by itself, such as diagonal",
        )
    with ExitStack() as stack:
        for each in _surroundings(duals[0]):
            stack.enter_context(each)
        dtype = next(of.parameters()).dtype
        # A view of what requires a gradient would require one even where there is none.
        given = [(z if torch.is_grad_enabled() else z.detach()).to(dtype) for z in duals]
        if only is not None:
            return [_as_read(of.one(only, *given), duals[only])]
        values = cast("Sequence[Tensor]", of(*given))
        return [_as_read(value, dual) for value, dual in zip(values, duals, strict=True)]


def _surroundings(dual: Tensor) -> Iterator[AbstractContextManager[Any]]:
    """What a map is computed under, wherever in a forward it is read."""
    if autocasting(dual):
        yield torch.autocast(dual.device.type, enabled=False)
    if torch.compiler.is_compiling() or _transformed():
        return
    if torch.is_inference_mode_enabled():
        yield torch.inference_mode(mode=False)
        yield torch.no_grad()
    if _saving_is_watched():
        # Checkpointing counts what a region saves for its backward. A value that was read before
        # the region is computed within it when it runs again, so what the map saves must not count.
        yield torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _unchanged)


def _as_read(value: Tensor, dual: Tensor) -> Tensor:
    value = value.to(dual.dtype)
    if torch.compiler.is_compiling() or _transformed() or torch.is_grad_enabled():
        return value
    # Some kernels are chosen by whether a weight requires a gradient, even under no_grad.
    return value.detach().requires_grad_(dual.requires_grad)


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def _saving_is_watched() -> bool:
    """Whether somebody's hooks get what is saved for the backward."""
    hooks = cast("Any", torch._C)._autograd  # pyright: ignore[reportPrivateUsage]
    return hooks._top_saved_tensors_default_hooks(False) is not None


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class MirrorHost(nn.Module):
    """A module of which one or more parameters are duals. Stands right above ``nn.Module``.

    Below every other mixin, so that whatever those do with a parameter they do with its value.
    """

    def __getattr__(self, name: str) -> Any:
        value = cast("Tensor | None", nn.Module.__getattr__(self, name))
        links = cast("Links | None", self.__dict__.get(LINKS))
        if links is None or value is None or name not in links:
            return value
        if is_sharded(cast("nn.Parameter", value)) and _memo.get() is None:
            # It is looked at by whoever shards it, not computed with.
            return value
        attachment, index = links[name]
        return attachment.read(index, value)


class Scope(Generated):
    """Base of what makes a map be computed once in a forward; see ``scope_of``."""


@cache
def scope_of(cls: type[nn.Module]) -> type[Scope]:
    """The mixin whose forward is that of a class, with mapped values remembered meanwhile.

    One for each class: its signature is that of the class, which libraries look at.
    """

    class MirrorScope(Scope, _Module):
        @classmethod
        def recipe(cls) -> tuple[Callable[..., type], tuple[Any, ...]]:
            """The function and the class it is made for."""
            return scope_of, (stock,)

        @functools.wraps(cls.forward)
        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, *args: Any, **kwargs: Any
        ) -> Any:
            if torch.compiler.is_compiling():
                return super().forward(*args, **kwargs)
            module = without_caches(self)
            run = below(type(module), MirrorScope, "forward")
            if _memo.get() is not None:
                return run(module, *args, **kwargs)
            with remembered():
                return run(module, *args, **kwargs)

    stock = cls
    return MirrorScope


@contextmanager
def remembered() -> Generator[None]:
    """Compute each mapped value once in this block, unless gradients are switched on or off."""
    token = _memo.set({})
    try:
        yield
    finally:
        _memo.reset(token)


@contextmanager
def as_they_are(attachments: Sequence[Attachment]) -> Generator[None]:
    """Read the parameters of some attachments as they are in this block."""
    numbers = frozenset(each.family.number for each in attachments)
    token = _unmapped.set(_unmapped.get() | numbers)
    # Values that were read before the block are not those to be read in it.
    outer = _memo.set(None if _memo.get() is None else {})
    compiled = nullcontext() if COMPILER_SEES_CONTEXT else _set_stance("force_eager")
    try:
        with compiled:
            yield
    finally:
        _memo.reset(outer)
        _unmapped.reset(token)


def attach(root: nn.Module, holder: nn.Module, key: str, attachment: Attachment) -> None:
    """Give a module a map, and have the modules of its parameters read through it.

    Args:
        root: The model; its forward is what values are remembered for.
        holder: The module that the map becomes a part of.
        key: Its name among the maps of that module.
        attachment: The map and its parameters.
    """
    mirrors = mirrors_of(holder)
    if mirrors is None:
        mirrors = Mirrors()
        mirrors.train(holder.training)
        cover(holder)
        holder.add_module(MAPS, mirrors)
    mirrors.add_module(key, attachment.map)
    _sort(mirrors, holder)
    for index, (module, name) in enumerate(attachment.members):
        links = {**links_of(module), name: (attachment, index)}
        # Another thread reads either the old links or the new ones.
        module.__dict__[LINKS] = links
        for mixin in (MirrorHost, scope_of(stock_class(module))):
            if mixin not in grafts(module):
                graft(module, mixin)
    scope = scope_of(stock_class(root))
    if scope not in grafts(root):
        graft(root, scope)


def _sort(mirrors: Mirrors, holder: nn.Module) -> None:
    """Put maps in the order of the parameters, whatever order they came in: as before an undo."""
    held = cast("dict[str, nn.Module]", mirrors.__dict__["_modules"])
    own = [name for name in own_parameters(holder) if name in held]
    for key in (*own, *sorted(set(held) - set(own), key=int)):
        held[key] = held.pop(key)


def detach(root: nn.Module, holder: nn.Module, key: str) -> Attachment:
    """Take a map away again, and what it needed if no other map does.

    Returns:
        What was attached.
    """
    mirrors = cast("Mirrors", mirrors_of(holder))
    going = cast("MirrorMap", children(mirrors)[key])
    found = next(each for each in attachments(root) if each.map is going)
    for module, name in found.members:
        links = {other: link for other, link in links_of(module).items() if other != name}
        if links:
            module.__dict__[LINKS] = links
            continue
        ungraft(module, MirrorHost)
        if module is not root:
            ungraft(module, scope_of(stock_class(module)))
        del module.__dict__[LINKS]
    del mirrors.__dict__["_modules"][key]
    if not children(mirrors):
        del holder.__dict__["_modules"][MAPS]
        uncover(holder)
    if not attachments(root):
        ungraft(root, scope_of(stock_class(root)))
    return found


def attachments(model: nn.Module) -> list[Attachment]:
    """What maps the parameters of a model, in module order."""
    found: dict[int, Attachment] = {}
    for _, module in named_modules(model, duplicates=False):
        for attachment, _index in links_of(module).values():
            found.setdefault(id(attachment), attachment)
    return list(found.values())


def mirrors_of(holder: nn.Module) -> Mirrors | None:
    """The maps that a module holds."""
    return cast("Mirrors | None", children(holder).get(MAPS))


def check_free(module: nn.Module, path: str) -> None:
    """Raise if the name that maps need is taken.

    Raises:
        Conflict: the module has an attribute ``mirror`` of its own.
    """
    if mirrors_of(module) is None:
        check_name(module, path, MAPS, what="a map", leave_out="the module")


def check_carrier(module: nn.Module, path: str) -> None:
    """Raise if a module cannot be made one whose parameters are duals.

    Raises:
        ModelStateError: see ``check_graftable``.
    """
    check_graftable(module, path or stock_class(module).__name__)


def elsewhere(module: nn.Module, parameter: str) -> str | None:
    """The attribute in which a module keeps a parameter a second time, past its name, if any.

    A forward that reads it there, as those of torch's recurrent layers do, sees the dual.
    """
    tensor = own_parameters(module)[parameter]
    for name, value in module.__dict__.items():
        if isinstance(value, (list, tuple)) and any(each is tensor for each in cast("Any", value)):
            return name
    return None


def _set_stance(stance: str) -> AbstractContextManager[object]:
    return cast("Any", torch.compiler.set_stance)(stance)
