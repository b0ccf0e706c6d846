"""Modules that are adapted through their weights: whoever reads one gets the changed one.

This is right for every forward that reads the parameter by its name, whatever it does with it:
the stacked weights of experts, the projections of ``nn.MultiheadAttention``, a convolution that
standardises its weight first. It forms the changed weight, so the hosts that know their layer
are faster where they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from architectures.adapters import Adapter
from surgery.passes.hosts.bank import Bank, bank_of
from surgery.passes.hosts.branch import autocasting

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

M = TypeVar("M", bound=nn.Module)

# (module, parameter, whether gradients are on) → the changed weight, while a forward runs.
_Formed = dict[tuple[int, str, bool], Tensor]
_formed: ContextVar[_Formed | None] = ContextVar("surgery_formed_weights", default=None)


_PLAIN = (nn.Parameter, Tensor)
_REGISTRIES = frozenset(nn.Module().__dict__)


class WeightHost(_Module):
    """A module of which one or more parameters carry adapters.

    ``module.weight`` gives the changed weight, formed at most once in a forward of the module.
    The parameter itself stays in ``parameters()`` and the state dict.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock forward gives for the changed weights."""
        if torch.compiler.is_compiling():
            # The compiler merges repeated computations; a context variable cannot be set here.
            return super().forward(*args, **kwargs)
        token = _formed.set({})
        try:
            module = without_caches(self)
            return below(type(module), WeightHost, "forward")(module, *args, **kwargs)
        finally:
            _formed.reset(token)

    def __getattr__(self, name: str) -> Any:
        if torch.compiler.is_compiling():
            value: Any = super().__getattr__(name)
        else:
            value = below(type(self), WeightHost, "__getattr__")(self, name)
        if name not in self.__dict__["_parameters"] or value is None or value.dim() < 2:
            return value
        bank = bank_of(self, name)
        # A layer has one bank, and may have other parameters than the one it belongs to.
        if (
            bank is None
            or bank.parameter != name
            or (type(value) not in _PLAIN and not _computing())
        ):
            # What became a shard since is only looked at by whoever shards it, until it is whole
            # again for the forward.
            return value
        return _formed_once(self, name, bank, value)


@cache
def below(cls: type, mixin: type, name: str) -> Callable[..., Any]:
    """What ``super()`` would find in a class from within a mixin.

    ``super()`` itself refuses an object from which another thread has just taken the mixin; what
    it finds then is the stock class's.
    """
    order = cls.__mro__
    start = order.index(mixin) + 1 if mixin in order else 0
    return next(vars(parent)[name] for parent in order[start:] if name in vars(parent))


def without_caches(module: M) -> M:
    """The module, or a stand-in that has everything of it but what its forwards remembered.

    Some attentions keep in a plain dict, while they evaluate, what they computed from a
    parameter. Kept from one mix of adapters it would be wrong for the next, and after an undo.
    """
    # Of a copy: another thread may put an adapter in at this moment.
    attributes = module.__dict__.copy()
    caches = [name for name, value in attributes.items() if _may_cache(name, value)]
    if not caches:
        return module
    other = object.__new__(type(module))
    other.__dict__.update(attributes)
    for name in caches:
        other.__dict__[name] = {}
    return other


def _may_cache(name: str, value: Any) -> bool:
    if type(value) is not dict or name in _REGISTRIES:
        return False
    return all(isinstance(item, Tensor) for item in cast("dict[Any, Any]", value).values())


def _computing() -> bool:
    """Whether the forward of some host runs in this thread."""
    return torch.compiler.is_compiling() or _formed.get() is not None


def _formed_once(module: nn.Module, name: str, bank: Bank, weight: Tensor) -> Tensor:
    cache = None if torch.compiler.is_compiling() else _formed.get()
    if cache is None:
        return changed_weight(bank, weight)
    key = (id(module), name, torch.is_grad_enabled())
    if key not in cache:
        cache[key] = changed_weight(bank, weight)
    return cache[key]


def changed_weight(bank: Bank, weight: Tensor) -> Tensor:
    """The weight with everything that counts added, in its own shape and dtype.

    It is formed in the wider of the dtypes of weight and factors, also under autocast: what the
    forward then does with it is the forward's business.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # An inference tensor would lack what the last lines below need.
        with torch.inference_mode(mode=False), torch.no_grad():
            return changed_weight(bank, weight)
    counting = bank.counting()
    if not counting:
        return bank.seal(weight, weight)
    folded = bank.matrix.fold(weight)
    if autocasting(weight):
        with torch.autocast(weight.device.type, enabled=False):
            changed = _sum(folded, counting)
    else:
        changed = _sum(folded, counting)
    changed = bank.matrix.unfold(changed.to(weight.dtype))
    if bank.trained and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Some kernels are chosen by whether the weight requires a gradient, even under no_grad.
        # Detached first: a view requires a gradient only if its base does.
        changed = changed.detach().requires_grad_()
    return bank.seal(changed, weight)


def _sum(folded: Tensor, counting: list[tuple[Adapter, float]]) -> Tensor:
    changed = folded
    for adapter, share in counting:
        changed = torch.add(changed, adapter.change(folded), alpha=share)
    return changed
