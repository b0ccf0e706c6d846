"""Stacks: runs of repeated layers through which the state keeps its width.

Found from the module tree alone. ``model.layers`` of a Llama is a stack; the list of a Swin's
stages is not (each stage has a width of its own), but the blocks of each stage are; the experts
inside a layer are not, since they lie inside a layer of a stack already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from surgery.capture.graft import stock_class
from surgery.select.sites import is_container, is_layer, layer_widths, own_children, own_parameters

_MORE_THAN_STAGES = 7
Named = tuple[str, nn.Module]
Signature = dict[str, tuple[int, ...]]
_SIBLINGS = 3
"""Alike siblings outside a list that make a stack; two are as often a pair side by side."""


@dataclass(frozen=True)
class Stack:
    """Layers that follow one another and keep the state's width.

    Attributes:
        path: Path of the module that holds the layers; empty for the model itself.
        layers: Paths of the layers, in order.
        type: Class name of the layers; several joined by ``|``.
        whole: Whether the layers are everything their holder holds.
    """

    path: str
    layers: tuple[str, ...]
    type: str
    whole: bool = True

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        if self.whole:
            return self.path or "(the model)"
        first, last = (path.rpartition(".")[2] for path in (self.layers[0], self.layers[-1]))
        return f"{self.path or '(the model)'} {first}..{last}"


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Every stack of a model that lies in no layer of another, in module order."""
    return tuple(_search("", model))


def stacks_inside(model: nn.Module, stacks: Iterable[Stack]) -> Iterator[Stack]:
    """The stacks that lie inside the layers of others, at any depth."""
    for layer in (layer for stack in stacks for layer in stack.layers):
        inside = tuple(_search(layer, model.get_submodule(layer)))
        yield from inside
        yield from stacks_inside(model, inside)


def _descend(path: str, module: nn.Module) -> Iterator[Named]:
    yield path, module
    for name, child in own_children(module).items():
        yield from _descend(_join(path, name), child)


def _search(path: str, module: nn.Module) -> Iterator[Stack]:
    lists = list(_lists(path, module))
    yield from lists or _siblings(path, module)


def _lists(path: str, module: nn.Module) -> Iterator[Stack]:
    """Stacks made by lists, the outermost; a list of one counts if only such are inside it."""
    found = _list_stacks(path, module)
    covered = {layer for stack in found for layer in stack.layers}
    children = [(_join(path, name), child) for name, child in own_children(module).items()]
    # More in a row than a network has stages are blocks, whatever lists these hold (Xception).
    longest = max((len(stack) for stack in found), default=0)
    partial = len(covered) < len(children) and longest < _MORE_THAN_STAGES
    if found and partial and any(_has_list(child) for at, child in children if at in covered):
        # Half of a list of stages that happen to be alike: the runs inside them are the stacks.
        found, covered = [], set[str]()
    yield from found
    inside = [s for at, child in children if at not in covered for s in _lists(at, child)]
    if not found and len(children) == 1 and all(len(stack) == 1 for stack in inside):
        one = list(_list_of_one(path, module, children[0]))
        inside = one or inside
    yield from inside


def _has_list(module: nn.Module) -> bool:
    return any(_list_stacks(path, inner) for path, inner in _descend("", module))


def _list_stacks(path: str, module: nn.Module) -> list[Stack]:
    if not is_container(module):
        return []
    children = [(_join(path, name), child) for name, child in own_children(module).items()]
    if len(children) < 2:
        return []
    mixed = _few_classes(children)
    runs = _runs([(at, child, _Layer(child)) for at, child in children], mixed=mixed)
    return [_stack(path, run, whole=len(run) == len(children)) for run in runs if len(run) > 1]


def _list_of_one(path: str, holder: nn.Module, only: Named) -> Iterator[Stack]:
    if not isinstance(holder, nn.ModuleList | nn.Sequential) or any(_siblings(*only)):
        return
    layer = _Layer(only[1])
    if layer.weights > 1 and layer.keeps_width:
        yield _stack(path, [only], whole=True)


def _siblings(path: str, module: nn.Module) -> Iterator[Stack]:
    """Alike layers under names of their own (block1, block2, ...), where no list makes a stack."""
    children = [(_join(path, name), child) for name, child in own_children(module).items()]
    groups: dict[object, list[Named]] = {}
    for at, child in children:
        signature = _Layer(child).signature
        if not is_layer(child) and any(len(shape) > 1 for shape in signature.values()):
            groups.setdefault((stock_class(child), *signature.items()), []).append((at, child))
    alike = [group for group in groups.values() if len(group) >= _SIBLINGS]
    for group in alike:
        yield _stack(path, group, whole=len(group) == len(children))
    covered = {at for group in alike for at, _ in group}
    for at, child in children:
        if at not in covered:
            yield from _siblings(at, child)


def _few_classes(children: Sequence[Named]) -> bool:
    """Whether classes recur (attention and Mamba layers, say) rather than each being a part."""
    classes = Counter(stock_class(child) for _, child in children)
    return len(classes) > 1 and 2 * len(classes) <= len(children)


class _Layer:
    """What tells whether a module can follow another in a stack."""

    def __init__(self, module: nn.Module) -> None:
        self.cls = stock_class(module)
        self.module = module
        self._signature: Signature | None = None
        self._widths: tuple[int, int] | None = None
        self._weights = 0
        self._strided = False
        self._measured = False

    @property
    def signature(self) -> Signature:
        if self._signature is None:
            self._signature = {
                _join(path, name): tuple(tensor.shape)
                for path, module in _descend("", self.module)
                for name, tensor in own_parameters(module).items()
            }
        return self._signature

    def _measure(self) -> None:
        if self._measured:
            return
        self._measured = True
        layers = [module for _, module in _descend("", self.module)]
        widths = [found for layer in layers if (found := layer_widths(layer)) is not None]
        self._weights = len(widths)
        self._widths = (widths[0][0], widths[-1][1]) if widths else None
        self._strided = any(_is_strided(layer) for layer in layers)

    @property
    def weights(self) -> int:
        """How many layers with a matrix it holds."""
        self._measure()
        return self._weights

    @property
    def keeps_width(self) -> bool:
        """Whether what its first layer takes in is what its last gives out, at equal resolution."""
        self._measure()
        return self._widths is not None and len(set(self._widths)) == 1 and not self._strided

    @property
    def out(self) -> int | None:
        self._measure()
        return None if self._widths is None else self._widths[1]

    def follows(self, before: _Layer, *, mixed: bool) -> bool:
        """Whether it takes the state on from ``before`` without changing its width."""
        if self.cls is before.cls and self.signature == before.signature:
            # Single layers make a stack only as matrices that can be chained.
            return bool(self.signature) and (not is_layer(self.module) or self.keeps_width)
        if is_layer(self.module) or (self.cls is not before.cls and not mixed):
            return False
        same_class = self.cls is before.cls
        return (same_class and self._mostly_like(before)) or (
            self.keeps_width and before.out == self.out
        )

    def _mostly_like(self, before: _Layer) -> bool:
        mine, other = self.signature, before.signature
        shared = mine.keys() & other.keys()
        equal = sum(mine[name] == other[name] for name in shared)
        return 2 * equal > len(shared) > 0


def _is_strided(module: nn.Module) -> bool:
    """A downsampling convolution; a stride equal to 1 in every direction keeps the resolution."""
    if not isinstance(module, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
        return False
    return any(step != 1 for step in module.stride)


def _runs(layers: Sequence[tuple[str, nn.Module, _Layer]], *, mixed: bool) -> list[list[Named]]:
    runs: list[list[Named]] = []
    before: _Layer | None = None
    for path, module, layer in layers:
        if before is not None and layer.follows(before, mixed=mixed):
            runs[-1].append((path, module))
        else:
            runs.append([(path, module)])
        before = layer
    return runs


def _stack(path: str, members: Sequence[Named], *, whole: bool) -> Stack:
    types = dict.fromkeys(stock_class(module).__name__ for _, module in members)
    return Stack(path, tuple(at for at, _ in members), "|".join(types), whole)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
