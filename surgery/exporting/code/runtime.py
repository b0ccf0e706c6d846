"""Learned shortcuts between layers, in plain operations: what generated files contain.

Nothing here is imported by an export; the text of what it needs is copied into it. It computes
what ``surgery.passes.streams`` computes, without its fused kernels and its checks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from architectures.shortcuts.base import Topology
from architectures.shortcuts.kernels.plain import combine
from architectures.shortcuts.mixer import Mixer
from surgery.passes.streams.ports import at, put

_Holder = nn.Module if TYPE_CHECKING else object


@dataclass(frozen=True)
class Stream:
    """Where a layer takes its state in, and where that is in what it returns.

    Attributes:
        position: Index among the positional arguments, or None.
        name: Name of the argument, or None.
        inner: How to reach the state within the argument.
        result: How to reach it within the result.
    """

    position: int | None
    name: str | None
    inner: tuple[int | str, ...] = ()
    result: tuple[int | str, ...] = ()

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The state among the arguments of a layer; None if it is not passed."""
        named = self.name is not None and self.name in kwargs
        return at(kwargs[self.name] if named else args[self.position], self.inner)  # type: ignore[index]

    def read_result(self, result: Any) -> Any:
        """The state in what a layer returned; None if it ended."""
        return at(result, self._path(result))

    def written_result(self, result: Any, state: Tensor) -> Any:
        """What a layer returned, with another state."""
        return put(result, self._path(result), state)

    def _path(self, result: Any) -> tuple[int | str, ...]:
        if isinstance(result, Tensor):
            return ()
        return (0,) if not self.result and isinstance(result, (tuple, list)) else self.result


class Shortcuts(Mixer):
    """The coefficients of consecutive layers: ``x_{k+1} = layer_k(x_k) + sum_j W_kj x_j``.

    Args:
        topology: Gives the coefficients.
        diagonal: Added to them on the diagonal before they are used.
        shown: Added on the diagonal of the matrix that is shown.
        members: Names of the layers in their holder, in order.
        streams: The tensors that make up the state.
        frozen: Coefficients that take the place of the learned ones.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        diagonal: float,
        shown: float,
        members: Sequence[str],
        streams: Sequence[Stream],
        frozen: Topology | None = None,
    ) -> None:
        super().__init__(topology, diagonal=diagonal, shown=shown)
        self.members = tuple(members)
        self.streams = tuple(streams)
        self.frozen = frozen

    def forward(self) -> Tensor:
        """``W``."""
        return super().forward() if self.frozen is None else self.frozen()

    @property
    def edges(self) -> Sequence[Sequence[int]]:
        """Per layer, the states whose coefficient may differ from zero."""
        return self.support if self.frozen is None else self.frozen.support


def begin(holder: nn.Module) -> Steps:
    """The start of a forward through the layers of ``holder``."""
    return Steps(holder)


class Steps:
    """One forward through layers: ``steps(layer)(x)`` calls a layer and mixes what it returns."""

    def __init__(self, holder: nn.Module) -> None:
        found = cast("Any", holder).shortcuts.values()
        self._runs = [_Run(each, holder) for each in found]

    def __call__(self, layer: Any) -> Any:
        """What to call instead of ``layer``."""
        run = self._run_of(layer)
        return layer if run is None else functools.partial(run.step, layer, 0)

    def through(self, function: Callable[..., Any], block: Any = None) -> Callable[..., Any]:
        """What to call instead of ``function(layer, ...)``, which calls the layer."""

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            run = self._run_of(layer if block is None else block)
            if run is None:
                return function(layer, *args, **kwargs)
            return run.step(function, 1, layer, *args, **kwargs)

        return call

    def sequence(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What to call instead of ``function(layers, x, ...)``, which checkpoints a sequence."""
        return functools.partial(_sequence, function, self)

    def view(self, function: Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
        """What to call instead of ``holder.children`` or ``holder.named_children``."""

        def call() -> Iterable[Any]:
            for item in function():
                if (item[0] if isinstance(item, tuple) else "") != "shortcuts" and not isinstance(
                    item, nn.ModuleDict
                ):
                    yield item

        return call

    def _run_of(self, target: Any) -> _Run | None:
        while type(target) is functools.partial:
            target = target.func
        if inspect.ismethod(target):
            target = target.__self__
        return next((run for run in self._runs if run.takes(target)), None)


class _Run:
    """The layers of one set of shortcuts, called one after the other."""

    def __init__(self, shortcuts: Shortcuts, holder: nn.Module) -> None:
        self._shortcuts = shortcuts
        self._layers = [holder.get_submodule(name) for name in shortcuts.members]
        self._next = 0
        self._weights = torch.empty(0)
        self._states: list[dict[int, Tensor]] = []

    def takes(self, layer: Any) -> bool:
        if self._next == len(self._layers):
            self._next = 0
        if layer is self._layers[self._next]:
            return True
        if any(layer is each for each in self._layers):
            raise RuntimeError("the layers of learned shortcuts must be called in order")
        return False

    def step(self, function: Callable[..., Any], skip: int, *given: Any, **kwargs: Any) -> Any:
        site, shortcuts = self._next, self._shortcuts
        if site == 0:
            self._weights = shortcuts()
            self._states = [{} for _ in shortcuts.streams]
        self._next += 1
        for stream, states in zip(shortcuts.streams, self._states, strict=True):
            state = stream.read(given[skip:], kwargs)
            if state is not None:
                states[site] = state
        result = function(*given, **kwargs)
        for stream, states in zip(shortcuts.streams, self._states, strict=True):
            made = stream.read_result(result)
            if made is not None and site in states:
                mixed = self._mixed(made, site, states)
                recorded(made, mixed)
                result = stream.written_result(result, mixed)
        return result

    def _mixed(self, made: Tensor, site: int, states: Mapping[int, Tensor]) -> Tensor:
        row, sites = self._weights[site], len(self._layers)
        used = [j for j in self._shortcuts.edges[site] if j in states]
        scale = row[sites] if len(row) > sites else None
        if not used and scale is None:
            return made
        return combine(made, scale, row[used], [states[j] for j in used])


def recorded(before: Tensor, after: Tensor) -> None:
    """Tell whoever records the states between layers; nobody does here."""


def _sequence(
    function: Callable[..., Any], steps: Steps, layers: Iterable[Any], *args: Any, **kwargs: Any
) -> Any:
    bound = inspect.signature(function).bind(layers, *args, **kwargs).arguments
    torchs = cast("Any", torch_checkpoint)
    of_torch = function is torchs.checkpoint_sequential
    last = bool(bound.get("skip_last", of_torch))
    state = bound["input"] if of_torch else bound["x"]
    recomputed = functools.partial(torchs.checkpoint, use_reentrant=False)
    found = list(layers)
    for index, layer in enumerate(found):
        if last and index == len(found) - 1:
            state = steps(layer)(state)
        else:
            state = steps.through(recomputed)(layer, state)
    return state


def share(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Put modules in the place of others, too; a state dict then holds each of them once.

    Args:
        model: The root.
        shared: Path of what is replaced → path of the module that takes its place.
    """
    for path, first in shared.items():
        model.set_submodule(path, model.get_submodule(first))
    hooks = cast("Any", model)
    hooks.register_state_dict_post_hook(functools.partial(_each_once, shared))
    hooks.register_load_state_dict_pre_hook(functools.partial(_every_name, shared))


def _each_once(
    shared: Mapping[str, str], _: nn.Module, state: dict[str, Any], prefix: str, __: Any
) -> None:
    for name in [name for name in state if _other_name(name, prefix, shared) is not None]:
        del state[name]


def _every_name(
    shared: Mapping[str, str], _: nn.Module, state: dict[str, Any], prefix: str, *__: Any
) -> None:
    for path, first in shared.items():
        for name in list(state):
            other = _other_name(name, prefix, {first: path})
            if other is not None:
                state.setdefault(other, state[name])


def _other_name(name: str, prefix: str, paths: Mapping[str, str]) -> str | None:
    for path, other in paths.items():
        if name.startswith(f"{prefix}{path}."):
            return prefix + other + name[len(prefix) + len(path) :]
    return None


class LayerList(_Holder):
    """An ``nn.ModuleList`` or ``nn.Sequential`` that has shortcuts beside its layers."""

    def __len__(self) -> int:
        return len(self._layers())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers())

    def __getitem__(self, index: int | slice) -> Any:
        found = self._layers()[index]
        if isinstance(found, nn.Module):
            return found
        return nn.Sequential(*found) if isinstance(self, nn.Sequential) else nn.ModuleList(found)

    def _layers(self) -> list[nn.Module]:
        modules = cast("dict[str, nn.Module]", self._modules)
        return [layer for name, layer in modules.items() if name != "shortcuts"]


class LayerDict(_Holder):
    """An ``nn.ModuleDict`` that has shortcuts beside its layers."""

    def __len__(self) -> int:
        return len(self._layers())

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers())

    def __contains__(self, key: object) -> bool:
        return key in self._layers()

    def keys(self) -> Any:
        """Names of the layers."""
        return self._layers().keys()

    def items(self) -> Any:
        """Names and layers."""
        return self._layers().items()

    def values(self) -> Any:
        """The layers."""
        return self._layers().values()

    def _layers(self) -> dict[str, nn.Module]:
        modules = cast("dict[str, nn.Module]", self._modules)
        return {name: layer for name, layer in modules.items() if name != "shortcuts"}
