"""Hosts: what a module becomes when its weight carries adapters.

A host is a class without state of its own, grafted onto the module. Everything it needs lies in
the module's child ``lowrank``, a ``Bank``. Without that child, as in the moment of an undo, it is
the stock module.
"""

from surgery.passes.hosts.attach import Place, attach, check_free, detach
from surgery.passes.hosts.bank import CHILD, Bank, Banks, Family, Mix, Override, bank_of, overrides
from surgery.passes.hosts.folding import Fold, has_folded
from surgery.passes.hosts.hosting import HOSTS, Hosting, hosting_of, is_plain
from surgery.passes.hosts.merging import BEFORE_MERGE, merge_into, mergeable, take_out
from surgery.passes.hosts.uses import Use, Uses
from surgery.passes.hosts.weight import below, without_caches

__all__ = [
    "BEFORE_MERGE",
    "CHILD",
    "HOSTS",
    "Bank",
    "Banks",
    "Family",
    "Fold",
    "Hosting",
    "Mix",
    "Override",
    "Place",
    "Use",
    "Uses",
    "attach",
    "bank_of",
    "below",
    "check_free",
    "detach",
    "has_folded",
    "hosting_of",
    "is_plain",
    "merge_into",
    "mergeable",
    "overrides",
    "take_out",
    "without_caches",
]
