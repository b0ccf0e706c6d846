"""The model of a fine-tuning run: loaded, given its head, rewritten, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from surgery.errors import NoMatch
from surgery.select import Match, ModelMap, Site, select
from surgery.train.assembly import rewritten
from surgery.train.finetune.heads import with_head
from surgery.train.finetune.source import load_source
from surgery.train.keeping import Changed
from surgery.train.recompute import recompute
from surgery.tree import named_parameters, own_parameters

if TYPE_CHECKING:
    from surgery.rules import Where
    from surgery.train.adapt.config import AdaptConfig
    from surgery.train.data.base import Data
    from surgery.train.finetune.config import FinetuneConfig


@dataclass(frozen=True)
class Built:
    """A model ready to be fine-tuned.

    Attributes:
        model: On the CPU and in train mode; what is trained requires gradients.
        new: Names of the parameters of a new head.
        loaded: Finds what is not as it was loaded; None where there are no rules, and all is
            trained.
        warnings: What the plan of the rules says people should think about.
    """

    model: nn.Module
    new: tuple[str, ...]
    loaded: Changed | None
    warnings: tuple[str, ...] = ()


def build(config: FinetuneConfig | AdaptConfig, data: Data) -> Built:
    """Load the model, give it a head, apply the rules; the same on every rank.

    Args:
        config: The configuration; what is new is drawn from its seed.
        data: Opened data, whose classes a head has to fit.

    Raises:
        SourceError: the model cannot be had.
        SurgeryError: it does not fit the task, or the rules cannot be applied.
    """
    section = config.model
    loaded = load_source(section, config.seed)
    headed = with_head(loaded, config.objective.kind, data.facts, section.head, config.seed)
    model = headed.model
    fresh = [p for name, p in named_parameters(model) if name in set(headed.new)]
    recipe = config.recipe
    before = None if recipe is None else Changed(model)
    warnings = () if recipe is None else rewritten(model, recipe)
    if recipe is None:
        model.requires_grad_(True)
    for parameter in fresh:
        parameter.requires_grad_(True)
    if section.unfreeze is not None:
        for parameter in chosen(model, section.unfreeze, "model.unfreeze"):
            parameter.requires_grad_(True)
    if config.train.checkpointing:
        recompute(model)
    return Built(model.train(), headed.new, before, warnings)


def chosen(model: nn.Module, where: Where, key: str) -> list[nn.Parameter]:
    """The own parameters of the modules that a selection means.

    Args:
        model: The model.
        where: As of a rule.
        key: What an error calls it.

    Raises:
        NoMatch: it means none.
    """
    selection = select(ModelMap(model), where, None, _accepts)
    if not selection.matched:
        raise NoMatch(
            f"{key} {where.dump()} selects nothing{selection.nearest}",
            hint="name modules that have parameters of their own, such as {role: norm}",
        )
    found: list[nn.Parameter] = []
    for site in selection.matched:
        own = own_parameters(site.module)
        found += own.values() if site.parameter is None else [own[site.parameter]]
    return found


def _accepts(site: Site) -> Match:
    if own_parameters(site.module):
        return Match.yes("it has parameters")
    return Match.no("it has no parameters of its own")
