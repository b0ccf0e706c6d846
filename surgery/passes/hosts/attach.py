"""Putting banks into modules, and taking them out, in an order a running forward survives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from surgery.capture.graft import graft, grafts, ungraft
from surgery.passes.hosts.bank import CHILD, Bank, Banks, bank_of
from surgery.passes.hosts.hosting import HOSTS
from surgery.passes.names import check_name


@dataclass(frozen=True)
class Place:
    """A module that carries, or will carry, a bank.

    Attributes:
        path: Path of the module.
        parameter: Name of the adapted parameter within it.
        host: Key in ``HOSTS``.
        bare: Whether the module is no single layer, so that several parameters may have banks.
    """

    path: str
    parameter: str
    host: str
    bare: bool


def check_free(module: nn.Module, path: str) -> None:
    """Raise if the name that a bank needs is taken.

    Raises:
        Conflict: the module has an attribute ``lowrank`` of its own.
    """
    if not isinstance(module.__dict__["_modules"].get(CHILD), (Bank, Banks)):
        check_name(module, path, CHILD, what="adapters", leave_out="the module")


def attach(module: nn.Module, place: Place, bank: Bank) -> None:
    """Give a module a bank, complete before the class that reads it is put over the module's."""
    if bank_of(module, place.parameter) is bank:
        return
    if place.bare:
        banks = module.__dict__["_modules"].get(CHILD)
        if banks is None:
            banks = Banks()
            banks.train(module.training)
            module.add_module(CHILD, banks)
        banks.add_module(place.parameter, bank)
    else:
        module.add_module(CHILD, bank)
    if HOSTS[place.host] not in grafts(module):
        graft(module, HOSTS[place.host])


def detach(module: nn.Module, place: Place) -> None:
    """Take a module's bank away again; the class first, if no other bank needs it."""
    child = module.__dict__["_modules"][CHILD]
    others = isinstance(child, Banks) and len(child.__dict__["_modules"]) > 1
    if not others:
        ungraft(module, HOSTS[place.host])
    if place.bare:
        del child.__dict__["_modules"][place.parameter]
    if not others:
        del module.__dict__["_modules"][CHILD]
