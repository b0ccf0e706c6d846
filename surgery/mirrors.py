"""Mirror maps in a model: which there are, what they make of duals, and forwards without them.

    for each in surgery.mirrors.attached(model):
        print(each.map, each.parameters)

A step of mirror descent on the parameters ``z`` of a rewritten model, by hand::

    z = {name: p for name, p in model.named_parameters()}
    phi = surgery.mirrors.primal(model, z)
    with surgery.mirrors.unmapped(model):
        loss = loss_of(torch.func.functional_call(model, phi, (x,)))
    names = [name for each in surgery.mirrors.attached(model) for name in each.parameters]
    steps = torch.autograd.grad(loss, [phi[name] for name in names])
    z.update({name: z[name] - a * step for name, step in zip(names, steps)})
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from architectures.mirror import MirrorMap
from surgery.errors import ModelStateError
from surgery.passes.duals import Attachment, as_they_are, attachments, mapped, remembered
from surgery.registry import suggest
from surgery.tree import joined, named_modules, named_parameters

__all__ = ["Mirrored", "attached", "dual", "primal", "remembered", "unmapped"]


@dataclass(frozen=True)
class Mirrored:
    """A mirror map of a model, by names.

    Attributes:
        parameters: Full names of the parameters that it maps, the duals, in the map's order.
        map: Full name of the map's module.
        map_parameters: Full names of the map's own parameters.
        kind: The class of the map.
    """

    parameters: tuple[str, ...]
    map: str
    map_parameters: tuple[str, ...]
    kind: type[MirrorMap]


def attached(model: nn.Module) -> list[Mirrored]:
    """Every mirror map of a model; none if it has none.

    Args:
        model: A rewritten model, or what wraps it.
    """
    return [names for names, _ in _named(model)]


def primal(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, those that are duals replaced by what their maps make of them.

    Pure and differentiable with respect to the duals and the maps' parameters; works under
    ``torch.func.vmap`` and ``grad``. As ``functional_call``, not for two threads at once on one
    model.

    Args:
        model: A rewritten model, or what wraps it.
        tensors: Parameters by name, duals and maps' own among them; of those that are missing the
            model's count.

    Returns:
        The same names and, if some were missing, every other dual of the model too, so that a
        forward within ``unmapped`` finds all of them mapped.

    Raises:
        ModelStateError: a name is no parameter or buffer of the model.
    """
    _check_names(model, tensors)
    values = dict(tensors)
    for names, attachment in _named(model):
        own = zip(names.parameters, attachment.duals(), strict=True)
        duals = [tensors.get(name, mine) for name, mine in own]
        given = {
            name.removeprefix(f"{names.map}."): tensors[name]
            for name in names.map_parameters
            if name in tensors
        }
        found = _mapped_with(attachment.map, given, duals)
        values.update(zip(names.parameters, found, strict=True))
    return values


@torch.no_grad()
def dual(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``primal`` with the maps' parameters as they are.

    For values that are to be the model's, such as pretrained ones under a map that was
    meta-learned elsewhere: ``model.load_state_dict(surgery.mirrors.dual(model, pretrained),
    strict=False)``.

    Args:
        model: A rewritten model, or what wraps it.
        tensors: Values by name. Of a map that couples parameters all or none are given.

    Returns:
        The same names, the mapped ones replaced by duals. Where a map has no closed inverse it is
        within ``architectures.mirror.legendre.TOLERANCE``.

    Raises:
        ModelStateError: a name is no parameter or buffer of the model, or some parameters of a map
            are missing.
        ArithmeticError: an inverse was not found.
    """
    _check_names(model, tensors)
    values = dict(tensors)
    for names, attachment in _named(model):
        missing = [name for name in names.parameters if name not in tensors]
        if len(missing) == len(names.parameters):
            continue
        if missing:
            raise ModelStateError(
                f"the map {names.map} couples {missing[0]} with {names.parameters[0]}, and the "
                "value of one of them is missing",
                hint="give the values of all parameters that a map couples",
            )
        dtype = next(attachment.map.parameters()).dtype
        wide = [tensors[name].to(dtype) for name in names.parameters]
        found = attachment.map.dual(*wide)
        for name, value in zip(names.parameters, found, strict=True):
            values[name] = value.to(tensors[name].dtype)
    return values


@contextmanager
def unmapped(model: nn.Module) -> Generator[None]:
    """Have the model compute with its parameters as they are, past the maps, in this block.

    Other threads and tasks are unaffected, and other models too. With activation checkpointing the
    backward belongs into the block as well, since it runs the forward again.

    Args:
        model: A rewritten model, or what wraps it. Without maps the block changes nothing.
    """
    with as_they_are(attachments(model)):
        yield


def _named(model: nn.Module) -> list[tuple[Mirrored, Attachment]]:
    """Every attachment with its names."""
    paths = {id(module): path for path, module in named_modules(model, duplicates=False)}
    found: list[tuple[Mirrored, Attachment]] = []
    for attachment in attachments(model):
        where = paths[id(attachment.map)]
        own = tuple(joined(where, name) for name, _ in named_parameters(attachment.map))
        members = tuple(joined(paths[id(module)], name) for module, name in attachment.members)
        found.append((Mirrored(members, where, own, type(attachment.map)), attachment))
    return found


def _mapped_with(
    of: MirrorMap, given: Mapping[str, Tensor], duals: list[Tensor]
) -> tuple[Tensor, ...]:
    """What a map makes of duals with other parameters than its own."""
    if not given:
        return tuple(mapped(of, duals))
    whole = {f"of.{name}": tensor for name, tensor in given.items()}
    call = torch.func.functional_call(_Call(of), whole, tuple(duals))
    return cast("tuple[Tensor, ...]", call)


class _Call(nn.Module):
    """A map called as a forward calls it: in its dtype, without autocast."""

    def __init__(self, of: MirrorMap) -> None:
        super().__init__()
        self.of = of

    def forward(self, *duals: Tensor) -> tuple[Tensor, ...]:
        return tuple(mapped(self.of, duals))


def _check_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    known = {name for name, _ in named_parameters(model)} | {n for n, _ in model.named_buffers()}
    unknown = next((name for name in tensors if name not in known), None)
    if unknown is not None:
        raise ModelStateError(
            f"{unknown!r} is no parameter or buffer of this {type(model).__name__}",
            hint=suggest(unknown, known),
        )
