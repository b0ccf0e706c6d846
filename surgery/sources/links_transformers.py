"""The conversions that transformers carries out while it loads and saves, tensor by tensor.

transformers keeps them as data (``transformers.conversion_mapping``): patterns of keys, and
operations such as stacking the matrices of all experts. They are resolved here to one ``Link`` per
tensor of the model, so that a checkpoint can be read one tensor at a time, and carried out by the
library's own code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from surgery.sources.libraries import require
from surgery.sources.links import Index, Link, Links, Part, Tensors

_CORE = "transformers.core_model_loading"


def linked(model: nn.Module, stock: Tensors, published: Tensors) -> Links:
    """Relate the keys of a checkpoint to the names of a model as ``from_pretrained`` does.

    Args:
        model: A model of transformers, with or without rewrites.
        stock: Every persistent tensor of the stock model by each of its names.
        published: The checkpoint.
    """
    resolver = _Resolver(model, stock)
    groups: dict[str, _Group] = {}
    unknown: list[str] = []
    core = require(_CORE)
    for key in sorted(published, key=core.dot_natural_key):
        found = resolver.resolve(key)
        if found is None:
            unknown.append(key)
            continue
        name, source = found
        group = groups.setdefault(name, _Group(name))
        group.sources[key] = source
    links = [_link(group, model, stock, published) for group in groups.values()]
    ignored = {key for key in unknown if resolver.ignores(key)}
    return Links(
        tuple(links),
        tuple(key for key in unknown if key not in ignored),
        tuple(key for key in unknown if key in ignored),
        frozenset(resolver.optional()),
    )


def published(model: nn.Module, stock: Tensors) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes: key → tensor; ``stock`` may lie on the meta device."""
    untyped = cast("Any", model)
    left_out: Iterable[str] = untyped._keys_to_ignore_on_save or ()
    state = {name: tensor for name, tensor in stock.items() if name not in set(left_out)}
    return dict(require(_CORE).revert_weight_conversion(model, state))


@dataclass(frozen=True)
class _Source:
    """One key on its way into the model.

    Attributes:
        converter: What converts it together with others, or None.
        pattern: The converter's pattern that it matched.
        between: Its name after all renamings, before the converter.
    """

    converter: Any
    pattern: str
    between: str


@dataclass
class _Group:
    """The keys that are converted together; ``name`` is the first tensor they fill."""

    name: str
    sources: dict[str, _Source] = field(default_factory=dict[str, _Source])


class _Resolver:
    """Finds where a key goes: ``convert_and_load_state_dict_in_model``, one key at a time."""

    def __init__(self, model: nn.Module, stock: Tensors) -> None:
        self.core = require(_CORE)
        mapping = require("transformers.conversion_mapping").get_model_conversion_mapping(model)
        self.renamings = [each for each in mapping if isinstance(each, self.core.WeightRenaming)]
        self.converters = [each for each in mapping if isinstance(each, self.core.WeightConverter)]
        self.by_pattern = {p: each for each in self.converters for p in each.source_patterns}
        self.model = cast("Any", model)
        self.prefix = str(self.model.base_model_prefix)
        self.stock = stock

    def resolve(self, key: str) -> tuple[str, _Source] | None:
        """The first name that a key fills, or None if the model has no place for it."""
        between = self.core.apply_renamings(key, self.renamings)
        bare, pattern = self.core.apply_converters(between, self.converters)
        name = self._prefixed(bare)
        if name not in self.stock and key in self.stock:
            return self._prefixed(key), _Source(None, key, key)
        if name not in self.stock:
            return None
        if pattern is None:
            return name, _Source(None, key, name)
        # The prefix is put on or taken off the converted name; before it, alike.
        between = self._alike(between, bare, name)
        return name, _Source(self.by_pattern[pattern], pattern, between)

    def ignores(self, key: str) -> bool:
        """Whether transformers leaves a key out on purpose."""
        patterns: set[str] = set(self.model._keys_to_ignore_on_load_unexpected or ())
        buffers = [name for name, _ in self.model.named_buffers()]
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(name.endswith("position_ids") for name in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return any(re.search(pattern, key) for pattern in patterns)

    def optional(self) -> Iterable[str]:
        """Names that transformers does not miss in a checkpoint."""
        patterns: set[str] = set(self.model._keys_to_ignore_on_load_missing or ())
        return (name for name in self.stock if any(re.search(p, name) for p in patterns))

    def _prefixed(self, name: str) -> str:
        """With the base model's prefix, or without, as this model has it."""
        if not self.prefix:
            return name
        without = name.removeprefix(f"{self.prefix}.")
        if without != name and without in self.stock:
            return without
        added = f"{self.prefix}.{name}"
        return added if added in self.stock else name

    def _alike(self, between: str, bare: str, name: str) -> str:
        if name == bare:
            return between
        if name == f"{self.prefix}.{bare}":
            return f"{self.prefix}.{between}"
        return between.removeprefix(f"{self.prefix}.")


def _link(group: _Group, model: nn.Module, stock: Tensors, published: Tensors) -> Link:
    keys = tuple(group.sources)
    converter = next(iter(group.sources.values())).converter
    if converter is None:
        # Two keys for one tensor: the last one read wins in transformers; both are named here.
        return Link(keys, (group.name,))
    conversion = _Conversion(converter, group, model)
    names = conversion.names(stock)
    return Link(
        keys,
        names,
        ", ".join(map(repr, converter.operations)),
        _parts(converter, group, names, published),
        conversion.load,
        conversion.publish,
    )


class _Conversion:
    """A converter of transformers, applied to one group of tensors."""

    def __init__(self, converter: Any, group: _Group, model: nn.Module) -> None:
        self.converter = converter
        self.group = group
        self.model = cast("Any", model)

    def names(self, stock: Tensors) -> tuple[str, ...]:
        """The stock tensors that it fills."""
        first, *others = self.converter.target_patterns
        found = [self.group.name.replace(first, other) for other in (first, *others)]
        shards = [name for pattern in found for name in self._expanded(pattern, stock)]
        return tuple(dict.fromkeys(shards))

    def load(self, given: Tensors) -> dict[str, Tensor]:
        """From keys to names."""
        working = copy.deepcopy(self.converter)
        for key, source in self.group.sources.items():
            working.add_tensor(self.group.name, key, source.pattern, given[key])
        return self._converted(working, self.group.name)

    def publish(self, given: Tensors) -> dict[str, Tensor]:
        """From names to keys."""
        working = self.converter.reverse_transform()
        first = ""
        for name in sorted(given, key=require(_CORE).dot_natural_key):
            renamed, pattern = working.rename_source_key(name)
            first = first or renamed
            working.add_tensor(first, name, pattern, given[name])
        keys = {source.between: key for key, source in self.group.sources.items()}
        made = self._converted(working, first)
        return {keys.get(between, between): tensor for between, tensor in made.items()}

    def _converted(self, working: Any, name: str) -> dict[str, Tensor]:
        made = working.convert(name, model=self.model, config=self.model.config)
        return {key: each[0] if isinstance(each, list) else each for key, each in made.items()}

    @staticmethod
    def _expanded(name: str, stock: Tensors) -> Iterable[str]:
        """A name, or all names that one with a star stands for."""
        if "*" not in name:
            return [name]
        pattern = re.compile(re.escape(name).replace(r"\*", r"\d+"))
        return [each for each in stock if pattern.fullmatch(each)]


def _parts(
    converter: Any, group: _Group, names: tuple[str, ...], published: Tensors
) -> Mapping[str, Part]:
    """Which block of the model's tensor each key is, of experts that are stacked and joined."""
    core = require(_CORE)
    operations = list(converter.operations)
    stacked = bool(operations) and type(operations[0]) is core.MergeModulelist
    rest = operations[1:] if stacked else operations
    joined = len(rest) == 1 and type(rest[0]) is core.Concatenate
    whole = len(names) == 1 and (joined or (stacked and not rest))
    if not whole or (stacked and operations[0].dim != 0):
        return {}
    axis = rest[0].dim if joined else None
    return _blocks(converter, group, names[0], published, stacked=stacked, axis=axis)


def _blocks(
    converter: Any,
    group: _Group,
    name: str,
    published: Tensors,
    *,
    stacked: bool,
    axis: int | None,
) -> Mapping[str, Part]:
    found: dict[str, Part] = {}
    start = 0
    for pattern in converter.source_patterns:
        keys = [key for key, source in group.sources.items() if source.pattern == pattern]
        length = 0
        for number, key in enumerate(keys):
            shape = published[key].shape
            index: Index = (number,) if stacked else ()
            if axis is not None:
                # The stack is a dimension in front of the published ones.
                own = axis - 1 if stacked else axis
                if not 0 <= own < len(shape):
                    return {}
                length = shape[own]
                index = (*index, *[slice(None)] * own, slice(start, start + length))
                start += 0 if stacked else length
            found[key] = Part(name, index)
        start += length if stacked else 0
    return found
