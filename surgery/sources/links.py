"""How the tensors of a published checkpoint become those of the model its library builds.

transformers renames, stacks and splits tensors while it loads (the experts of Mixtral are three
hundred matrices in the file and two parameters in the model); diffusers renames some. A ``Link``
is one such step: the keys it reads, the names it fills, and the way there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.errors import CheckpointError
from surgery.sources.libraries import library_of, stock_class

Tensors = Mapping[str, Tensor]
#: Where a published tensor lies in the model's: an index, or a slice, per leading dimension.
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Part:
    """A published tensor that is a block of one of the model's.

    Attributes:
        name: The model's tensor.
        index: ``tensor[index]`` is the published one.
    """

    name: str
    index: Index


@dataclass(frozen=True)
class Link:
    """Published tensors and the tensors of the stock model that are made of them.

    Attributes:
        keys: Keys of the published checkpoint, in the order the library reads them.
        names: Names in the stock model.
        operation: What the library does to the values, in its words; empty where the one tensor
            is taken over as it is.
        parts: Key → the block of the model's tensor that it is, where it is one unchanged.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    operation: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict[str, Part])
    _load: Callable[[Tensors], dict[str, Tensor]] | None = field(default=None, repr=False)
    _publish: Callable[[Tensors], dict[str, Tensor]] | None = field(default=None, repr=False)

    def load(self, published: Tensors) -> dict[str, Tensor]:
        """The stock model's tensors by name, from the published ones by key.

        Raises:
            CheckpointError: the library does not accept their shapes.
        """
        if self._load is None:
            return {self.names[0]: published[self.keys[0]]}
        return self._run(self._load, {key: published[key] for key in self.keys}, self.names)

    def publish(self, stock: Tensors) -> dict[str, Tensor]:
        """The published tensors by key, from the stock model's by name.

        Raises:
            CheckpointError: the library does not accept their shapes.
        """
        if self._publish is None:
            return {self.keys[0]: stock[self.names[0]]}
        return self._run(self._publish, {name: stock[name] for name in self.names}, self.keys)

    def _run(
        self,
        call: Callable[[Tensors], dict[str, Tensor]],
        given: Tensors,
        wanted: tuple[str, ...],
    ) -> dict[str, Tensor]:
        try:
            made = call(given)
        except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
            first = next(iter(given))
            raise CheckpointError(
                f"{self.operation} does not accept {first} {tuple(given[first].shape)} and "
                f"{len(given) - 1} more: {error}",
                hint="the checkpoint belongs to a model of another configuration",
            ) from error
        if set(made) != set(wanted):
            odd = min(set(made) ^ set(wanted))
            raise CheckpointError(
                f"{self.operation} of {next(iter(given))} gives {len(made)} tensors, expected "
                f"{len(wanted)}; the first that differs is {odd}"
            )
        return made


@dataclass(frozen=True)
class Links:
    """Everything that a published checkpoint has to do with a stock model.

    Attributes:
        links: One for every group of tensors that are converted together.
        unknown: Keys that lead to no tensor of the model.
        ignored: Keys that the library leaves out without a word, such as buffers of old versions.
        optional: Names that the library does not miss, such as buffers that are always the same.
    """

    links: tuple[Link, ...]
    unknown: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()


def linked(model: nn.Module, stock: Tensors, published: Tensors) -> Links:
    """Relate the keys of a checkpoint to the names of a model, as the model's library does.

    Args:
        model: A model of transformers, diffusers or timm, with or without rewrites; or any other.
        stock: Every persistent tensor of the stock model by each of its names; only shapes are
            looked at.
        published: The checkpoint; only shapes are looked at, so it may lie on the meta device.
    """
    library = library_of(stock_class(model))
    if library == "transformers":
        from surgery.sources import links_transformers

        return links_transformers.linked(model, stock, published)
    if library == "diffusers":
        return _by_name(stock, _diffusers_names(model, published))
    return _by_name(stock, {key: key for key in published})


def published(model: nn.Module, stock: Tensors) -> dict[str, Tensor]:
    """The layout that the model's library publishes: key → tensor on the meta device.

    Args:
        model: The model.
        stock: Its stock tensors by name, tied ones once.
    """
    empty = {name: on_meta(tensor) for name, tensor in stock.items()}
    if library_of(stock_class(model)) == "transformers":
        from surgery.sources import links_transformers

        return links_transformers.published(model, empty)
    return empty


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype that has no values."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _by_name(stock: Tensors, names: Mapping[str, str]) -> Links:
    """Links of tensors that are only renamed; ``names`` is key → name."""
    links = [Link((key,), (name,)) for key, name in names.items() if name in stock]
    return Links(tuple(links), tuple(key for key, name in names.items() if name not in stock))


def _diffusers_names(model: nn.Module, published: Tensors) -> dict[str, str]:
    """Key → name, as diffusers renames keys of its own older versions in a state dict."""
    untyped = cast("Any", model)
    # It only moves values from one key to another: the keys themselves serve as values.
    state: dict[str, Any] = {key: key for key in published}
    untyped._fix_state_dict_keys_on_load(state)
    return {key: name for name, key in state.items()}
