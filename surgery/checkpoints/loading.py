"""Stock weights into a rewritten model, and out of it: from memory, or streamed from a folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery import progress
from surgery.checkpoints.inventory import Place, is_quantised, places, take
from surgery.checkpoints.names import KeyMap, Published, keymap, opened_checkpoint, stock_state
from surgery.checkpoints.placing import fill, like, tie
from surgery.checkpoints.saving import stock_tensors
from surgery.copies import is_sharded, same_bits
from surgery.editing import begin, bound, settle
from surgery.errors import CheckpointError, ModelStateError
from surgery.record import Record, added_names, record_of
from surgery.save_guard import first_baked
from surgery.sources import describe, rebuild
from surgery.sources.links import Link
from surgery.tree import joined, named_modules


def stock_weights(model: nn.Module, *, published: bool = False) -> dict[str, Tensor]:
    """The stock model's state dict, out of a rewritten model.

    What a rewrite changed comes as it was before; stock parameters that were trained come as they
    are now. The tensors are the model's own where nothing has to be computed.

    Args:
        model: A model with or without rewrites.
        published: Give them in the layout that the model's library publishes, tied tensors once:
            ``safetensors.torch.save_file`` of it is a checkpoint that ``from_pretrained`` loads.

    Returns:
        Name, or published key → tensor.

    Raises:
        ModelStateError: a changed weight has no copy from before (``keep_base: none``, or
            adapters are merged).
    """
    record = record_of(model) or Record()
    lasting = next((edit for edit in record.edits if not edit.reversible), None)
    if lasting is not None:
        raise ModelStateError(
            f"rule {lasting.rule!r} changed the stock weight of {lasting.site} for good",
            hint="apply with keep_base: memory or source to have it back",
        )
    found = take(model)
    unique = stock_tensors(model, found, record)
    if published:
        return keymap(model).publish(unique)
    named = stock_state(found, added_names(model))
    return {name: unique.get(found.ties.get(name, name), named[name]) for name in named}


def load_weights(
    model: nn.Module,
    checkpoint: Published,
    *,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
) -> nn.Module:
    """Load a stock checkpoint into a model, rewritten or not, in place.

    Keys are renamed, stacked and split as the model's library does when it loads; values are cast
    to the dtypes of the model. What rewrites inserted keeps its values, and what they changed in
    stock weights is changed again in the new ones, so that ``undo`` gives those back.

    Args:
        model: The whole model, on any device but meta.
        checkpoint: A folder of safetensors, such as ``save_pretrained`` writes, of which one
            tensor at a time is in memory; or tensors by key.
        allow_missing: Leave stock tensors that the checkpoint lacks as they are.
        allow_unexpected: Leave out keys that the model has no place for.

    Returns:
        The same object; its parameters are the same objects too.

    Raises:
        CheckpointError: names, shapes or dtypes do not fit; the message has the first ones. The
            model is unchanged then.
        ModelStateError: adapters are merged, or what was inserted belongs to the present weights;
            or the model is on the meta device, quantised or sharded.
    """
    record = record_of(model) or Record()
    _check_loadable(model, record)
    names = keymap(model, checkpoint)
    names.check(allow_missing=allow_missing, allow_unexpected=allow_unexpected)
    touched = {name for edit in record.edits for name in edit.uses}
    left = sorted(touched.intersection(names.missing))
    if left:
        raise CheckpointError(
            f"{names.label} lacks {left[0]}, beside which rule "
            f"{_rule_of(record, left[0])!r} put something",
            hint="load a checkpoint that has it, or undo the rewrite first",
        )
    filled = _stream(model, names, checkpoint, None)
    for operation in record.operations:
        operation.kept = {n: t for n, t in operation.kept.items() if n not in filled}
    settle(model)
    return model


def materialize(
    model: nn.Module,
    checkpoint: Published,
    *,
    device: str | torch.device = "cpu",
    allow_unexpected: bool = False,
) -> nn.Module:
    """Give a model on the meta device its weights, streamed from a checkpoint, in place.

    For models that were loaded with ``device="meta"``, planned and rewritten there. Each tensor is
    read into the place where it stays; besides the model, one tensor of the checkpoint is in
    memory at a time. What rewrites inserted gets the values that applying them to the loaded
    model would have given, bit for bit. Dtypes are those of the model:
    ``surgery.load(spec, device="meta", dtype="bfloat16")``.

    Args:
        model: The whole model, with or without rewrites.
        checkpoint: A folder of safetensors, such as ``save_pretrained`` writes; or tensors by key.
        device: Where the tensors are put.
        allow_unexpected: Leave out keys that the model has no place for.

    Returns:
        The same object. Its parameters are new objects, since those on "meta" hold nothing.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or names, shapes or dtypes do not fit.
        ModelStateError: nothing is on the meta device; or a tensor that no checkpoint holds has no
            known value: nothing is left on "meta" in silence. The model is as it was then.
    """
    before = _on_meta(model)
    if not before:
        raise ModelStateError(
            "no tensor of the model is on the meta device",
            hint="to replace the weights that it has, call surgery.load_weights(model, folder)",
        )
    names = keymap(model, checkpoint)
    names.check(allow_unexpected=allow_unexpected)
    try:
        _fill_rest(model, names, torch.device(device))
        _stream(model, names, checkpoint, torch.device(device))
        _begin(model, torch.device(device))
    except BaseException:
        for place, tensor in before.values():
            place.put(tensor)
        raise
    return model


def _check_loadable(model: nn.Module, record: Record) -> None:
    for name, place in places(model):
        tensor = place.tensor
        if tensor.device.type == "meta":
            raise ModelStateError(
                f"{name} is on the meta device",
                hint="surgery.materialize(model, folder) puts the weights where they stay",
            )
        if is_quantised(tensor) or (isinstance(tensor, nn.Parameter) and is_sharded(tensor)):
            raise ModelStateError(
                f"{name} is quantised or sharded, and cannot be given other values",
                hint="load the weights before the model is quantised or sharded",
            )
    baked = first_baked(model, record)
    if baked is not None:
        raise ModelStateError(
            f"what was inserted at {baked.site} ({baked.summary}) is in the present weight itself",
            hint="unmerge the adapters (surgery.adapters.unmerge), or undo what was baked in",
        )
    edit = next(iter(bound(model, record)), None)
    if edit is not None:
        raise ModelStateError(
            f"what was inserted at {edit.site} ({edit.summary}) changed the weight while it was "
            "trained, and is of no use beside another",
            hint="merge or undo it first",
        )


def _rule_of(record: Record, name: str) -> str:
    return next(edit.rule for edit in record.edits if name in edit.uses)


def _stream(
    model: nn.Module, names: KeyMap, checkpoint: Published, device: torch.device | None
) -> Collection[str]:
    """Read a checkpoint tensor by tensor into a model; the names that were filled."""
    stream = _Stream(names, checkpoint, dict(places(model)), device)
    with progress.task("loading", sum(map(stream.size, names.by_key)), "bytes") as task:
        for link in names.links:
            for name, tensor in stream.made(link):
                stream.put(name, tensor)
            task.advance(sum(map(stream.size, link.keys)))
    stream.tie()
    return stream.filled


class _Stream:
    """A checkpoint on its way into a model.

    Args:
        names: The key map of both.
        checkpoint: The checkpoint.
        where: The places of the model by name.
        device: Where tensors are put that were on the meta device; None if none was.
    """

    def __init__(
        self,
        names: KeyMap,
        checkpoint: Published,
        where: Mapping[str, Place],
        device: torch.device | None,
    ) -> None:
        self.names = names
        self.where = where
        self.device = device
        self.filled: dict[str, str] = {}
        self.read, self.size = _reader(checkpoint)

    def made(self, link: Link) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors of one link, with no second copy of a tensor made of many."""
        if not link.parts or set(link.parts) != set(link.keys):
            yield from link.load({key: self.read(key) for key in link.keys}).items()
            return
        name = link.names[0]
        present = self.where[name].tensor
        device = self.device or present.device
        whole = torch.empty(present.shape, dtype=present.dtype, device=device)
        for key, part in link.parts.items():
            whole[part.index] = _cast(key, self.read(key), present).to(device)
        yield name, whole

    def put(self, name: str, tensor: Tensor) -> None:
        """Give a tensor its value; a second name of the same one must have the same value."""
        first = self.names.first(name)
        place = self.where[first]
        value = _cast(name, tensor, place.tensor)
        if first not in self.filled:
            with torch.no_grad():
                fill(place, value, set(), self.device)
            self.filled[first] = name
        elif not same_bits(place.tensor.detach().cpu(), value.cpu()):
            raise CheckpointError(
                f"{self.names.label} holds different values for {self.filled[first]} and {name}, "
                "which are one tensor in the model",
                hint="build the model with tie_word_embeddings=False, or remove one of them",
            )

    def tie(self) -> None:
        """Let further names hold the tensors that were put under the first ones."""
        for alias, first in self.names.tied.items():
            if first in self.filled:
                tie(self.where[alias], self.where[first])


def _reader(checkpoint: Published) -> tuple[Callable[[str], Tensor], Callable[[str], int]]:
    """How to read a tensor by key, and its size in bytes."""
    if isinstance(checkpoint, Mapping):
        return checkpoint.__getitem__, lambda key: checkpoint[key].nbytes
    opened = opened_checkpoint(checkpoint)
    return opened.read, lambda key: opened.tensors[key].slot.nbytes


def _cast(name: str, tensor: Tensor, present: Tensor) -> Tensor:
    """A value in the dtype of the model."""
    if tensor.dtype == present.dtype:
        return tensor
    wide = 2  # bytes of the narrowest dtype whose values mean what they say, without a scale
    floats = tensor.is_floating_point() and present.is_floating_point()
    if not floats or tensor.element_size() < wide:
        raise CheckpointError(
            f"{name} is {tensor.dtype} in the checkpoint and {present.dtype} in the model",
            hint="a quantised checkpoint is loaded with its own library",
        )
    return tensor.to(present.dtype)


def _on_meta(model: nn.Module) -> dict[str, tuple[Place, Tensor]]:
    return {n: (p, p.tensor) for n, p in places(model) if p.tensor.device.type == "meta"}


def _fill_rest(model: nn.Module, names: KeyMap, device: torch.device) -> None:
    """Values for what no checkpoint holds: buffers from their library, empty ones for the rest."""
    waiting = _on_meta(model)
    loose = list(_loose(model))
    held = {name for link in names.links for name in link.names}
    rest = [n for n in waiting if n not in names.new and not held & {n, names.first(n)}]
    if rest or loose:
        _fill_from_library(model, {name: waiting[name][0] for name in rest}, loose, device)
    used: dict[int, Tensor] = {}
    for name in names.new:
        if name in waiting:
            place, empty = waiting[name]
            if id(empty) not in used:
                used[id(empty)] = like(empty, torch.empty_like(empty, device=device))
            place.put(used[id(empty)])


def _loose(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Tensors on the meta device that are plain attributes: path, module, attribute."""
    for path, module in named_modules(model, duplicates=False):
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.device.type == "meta":
                yield path, module, key


def _fill_from_library(
    model: nn.Module,
    rest: Mapping[str, Place],
    loose: list[tuple[str, nn.Module, str]],
    device: torch.device,
) -> None:
    """Buffers and attributes with the values that the model's library gives them when it builds."""
    description = describe(model)
    first = next(iter(rest), None) or joined(loose[0][0], loose[0][2])
    if description is None:
        raise ModelStateError(
            f"{first} is on the meta device and no checkpoint holds it",
            hint="build the model with its buffers at hand: within "
            "accelerate.init_empty_weights(include_buffers=False)",
        )
    parameter = next((name for name, place in rest.items() if place.is_parameter), None)
    if parameter is not None:
        raise ModelStateError(
            f"{parameter} is on the meta device, and the checkpoint has no value for it",
            hint="load the model with its own library and apply the recipe to it",
        )
    wanted = [*rest, *(joined(path, key) for path, _, key in loose)]
    known = _as_built(description, wanted)
    for name, place in rest.items():
        place.put(known[name].to(device, place.tensor.dtype))
    for path, module, key in loose:
        vars(module)[key] = known[joined(path, key)].to(device)


def _as_built(description: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Buffers, and tensors that are plain attributes, as a library gives them their values."""
    found = _buffers(rebuild(description, parameters="meta"))
    left = [name for name in wanted if name not in found]
    if left:
        # Some are computed where the parameters are, so those have to be somewhere: for a moment,
        # and before the first weight is read.
        found = _buffers(rebuild(description))
        left = [name for name in wanted if name not in found]
    if left:
        raise ModelStateError(
            f"{left[0]} is on the meta device, and neither the checkpoint nor its library has a "
            "value for it",
            hint="load the model with its own library and apply the recipe to it",
        )
    return found


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Everything that has values in a model but its parameters."""
    found = {name: place.tensor for name, place in places(model) if not place.is_parameter}
    for path, module in named_modules(model, duplicates=False):
        plain = {k: each for k, each in vars(module).items() if isinstance(each, Tensor)}
        found.update({joined(path, key): each for key, each in plain.items()})
    return {name: tensor for name, tensor in found.items() if not tensor.is_meta}


def _begin(model: nn.Module, device: torch.device) -> None:
    """First values for what rewrites inserted, and proof that nothing was left out."""
    begin(model)
    added = added_names(model)
    where = dict(places(model))
    moved: dict[int, Any] = {}
    for name in added:
        place = where[name]
        if place.tensor.device != device and place.tensor.device.type != "meta":
            tensor = place.tensor
            moved.setdefault(id(tensor), like(tensor, tensor.detach().to(device)))
            place.put(moved[id(tensor)])
    left = next(iter(_on_meta(model)), None)
    if left is not None:
        raise ModelStateError(
            f"{left} is still on the meta device after everything was read",
            hint="please report it with the model and its rules",
        )
