"""What every pass is: a frozen dataclass of options that proposes, applies and reverts edits.

A pass decides nothing about selection. It is handed the sites that a rule selected, says for
each what it would do (``propose``, which changes nothing), and later does exactly that
(``apply``) or takes it back (``revert``), one edit at a time.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import nn

from surgery.capture.graft import check_graftable
from surgery.errors import ModelStateError
from surgery.record import Edit, Operation, Record
from surgery.rules import Recipe, Where
from surgery.select import Match, ModelMap, Site
from surgery.tree import named_modules


@dataclass(frozen=True)
class PlanContext:
    """What a pass may look at while it proposes.

    Attributes:
        model: The model as it is; never changed during planning.
        map: Its sites, stacks and roles.
        rule: Id of the rule being planned.
        seed: The recipe's seed.
        earlier: Edits of earlier rules of this recipe, then this rule's own are proposed.
        record: What was applied to the model before, if anything.
    """

    model: nn.Module
    map: ModelMap
    rule: str
    seed: int
    earlier: Sequence[Edit]
    record: Record | None


@dataclass
class ApplyContext:
    """What a pass needs while it applies or reverts.

    Attributes:
        seed: The recipe's seed.
        kept: Copies of stock tensors the pass changes, by full name (``keep_base: memory``).
        shared: What a pass wants to share among the edits of one application.
        values_follow: Whether every tensor gets its value afterwards, from a checkpoint: what is
            inserted needs no first values then, and stock tensors are left alone.
    """

    seed: int
    kept: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    values_follow: bool = False
    _modules: dict[int, dict[str, nn.Module]] = field(default_factory=dict[int, Any])

    def module(self, model: nn.Module, path: str) -> nn.Module:
        """The module at a dotted path; the tree is walked once, and again when it has grown."""
        known = self._modules.get(id(model))
        if known is None or path not in known:
            known = dict(named_modules(model))
            self._modules[id(model)] = known
        return known[path]

    @contextmanager
    def generator(self, name: str) -> Generator[torch.Generator]:
        """A CPU generator seeded from the recipe's seed and ``name`` alone.

        The global generator is untouched, and every rank of a distributed run agrees.
        """
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        yield torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Pass(ABC):
    """A rewrite by name: its dataclass fields are the options of a rule's ``with``.

    Subclasses are frozen pydantic dataclasses, so that a rule file's options are checked when
    they are read and print back as they were. The first line of a subclass's docstring states
    its contract.
    """

    name: ClassVar[str]
    needs_example: ClassVar[bool] = False
    #: Whether ``begin`` depends on nothing but what the edit ``needs``, so that edits may be begun
    #: in any order.
    separable: ClassVar[bool] = False
    #: What puts what it computes into the stock weights themselves, for hints; empty for nothing.
    settled_by: ClassVar[str] = ""

    @abstractmethod
    def accepts(self, site: Site) -> Match:
        """Whether this pass can edit a site at all, with the reason."""

    def chooser(self, sites: ModelMap, where: Where | None) -> Callable[[Site], Match]:
        """``accepts``, for a pass whose answer depends on the whole model.

        Args:
            sites: The model's facts.
            where: The condition of the rule that is being planned.
        """
        return self.accepts

    @abstractmethod
    def propose(self, sites: Sequence[Site], context: PlanContext) -> Sequence[Edit]:
        """The edits for the selected sites, in order. Changes nothing.

        Raises:
            RuleError: an option does not suit a site, such as a rank larger than its matrix.
            Conflict: a site is in a state the pass cannot work on.
        """

    def may_idle(self, edit: Edit) -> bool:
        """Whether what it inserts can be connected and get a gradient of zero all the same.

        A scale of numbers that are zero is such, and what lies behind a ReLU that is off.
        """
        return False

    def idles(self, model: nn.Module, edit: Edit) -> Iterable[str]:
        """Names of the tensors of earlier edits that nothing reads while this one is in force."""
        return ()

    def warnings(self, edits: Sequence[Edit], context: PlanContext) -> Sequence[str]:
        """What the person should think about before applying what was proposed."""
        return ()

    def code(self, model: nn.Module, edit: Edit) -> Mapping[str, str]:
        """``Class.method`` → the Python that an edit would put in its place, for people to read."""
        return {}

    def trains(self, edit: Edit) -> Mapping[str, str]:
        """The stock parameters that an edit makes something to be trained, which no rule freezes.

        Returns:
            Name → a tensor that the edit added; it holds as long as that tensor is there.
        """
        return {}

    def frozen(
        self, model: nn.Module, edits: Sequence[Edit], spared: AbstractSet[str]
    ) -> Iterable[str]:
        """Names of the parameters that must stop requiring gradients once ``edits`` are applied.

        Args:
            model: The model, with every edit of the recipe applied.
            edits: The edits of this pass's rule.
            spared: What is no part of a rest that is frozen; see the function of that name.
        """
        return ()

    def check_revertible(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Raise if ``revert`` could not take this edit back. Runs for all edits before any is.

        Raises:
            ModelStateError: somebody changed the site since, for example wrapped it.
        """
        check_graftable(context.module(model, edit.site), edit.site)

    @abstractmethod
    def apply(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Carry out one edit. Leaves the site as it was if it raises."""

    def needs(self, edit: Edit) -> tuple[str, ...]:
        """Names of the stock tensors whose values ``begin`` reads or changes."""
        return ()

    def keeps(self, edit: Edit) -> tuple[str, ...]:
        """Names of the stock tensors of which ``begin`` keeps a copy for undo."""
        return ()

    def begin(self, model: nn.Module, edit: Edit, context: ApplyContext) -> Edit:
        """Give what an edit inserted on the meta device the values that applying it gives.

        What the edit ``needs`` has its values by then, other stock tensors may have none; the
        edits of a model are begun in the order in which they were applied.

        Returns:
            The edit as it would have been planned with all values at hand.

        Raises:
            ModelStateError: a tensor it needs has no values, or does not suit the pass.
        """
        if not edit.adds:
            return edit
        raise ModelStateError(
            f"what {self.name!r} inserts at {edit.site} cannot be given its values by itself",
            hint="load the model's weights first, and apply the recipe to the loaded model",
        )

    def state(self, model: nn.Module, edit: Edit, context: ApplyContext) -> dict[str, Any] | None:
        """What was switched at an edit's site since it was applied, JSON-able, or None.

        Asked for when the model is saved; given to ``resume`` when it is restored.
        """
        return None

    def resume(
        self, model: nn.Module, edit: Edit, state: Mapping[str, Any], context: ApplyContext
    ) -> None:
        """Switch an edit that was just applied as ``state`` said."""
        return

    def settle(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Change the stock tensors as ``apply`` does, from the values of what it inserted.

        Asked for when an adapter that was saved alone has been loaded beside its stock weights.
        """
        return

    def originals(
        self, model: nn.Module, edit: Edit, context: ApplyContext
    ) -> Mapping[str, torch.Tensor]:
        """Name → stock tensor as it was before the edit, where the log keeps no copy of it."""
        return {}

    def baked(self, model: nn.Module, edit: Edit, context: ApplyContext) -> bool:
        """Whether the stock tensors alone now compute what the site computes, as after a merge.

        What was inserted adds nothing then, and belongs to no other stock tensors.
        """
        return False

    def bound(self, model: nn.Module, edit: Edit, context: ApplyContext) -> bool:
        """Whether what was inserted is of no use beside the stock tensors as they were before."""
        return False

    @abstractmethod
    def revert(self, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        """Take one applied edit back, bit for bit."""


def passes_of(operation: Operation) -> dict[str, Pass]:
    """Rule id → the pass with the options it was applied with, of the rules that did something."""
    did = {edit.rule for edit in operation.edits}
    rules = Recipe.parse(operation.recipe).rules
    return {rule.id: cast("Pass", rule.options) for rule in rules if rule.id in did}


def spared(record: Record, edits: Iterable[Edit], passes: Mapping[str, Pass]) -> set[str]:
    """Names of what was added by any edit, and of the stock parameters that one ``trains``.

    Args:
        record: What was applied before.
        edits: What is applied now.
        passes: Rule id → the pass of these.
    """
    added: set[str] = set()
    trained: dict[str, str] = {}
    now = ((passes[edit.rule], edit) for edit in edits)
    for made, edit in (*((made, edit) for made, edit, _ in in_force(record)), *now):
        gone = set(edit.removes)
        trained = {name: by for name, by in trained.items() if by not in gone}
        trained.update(made.trains(edit))
        added = {*(added - gone), *edit.adds}
    return {*added, *trained}


def in_force(record: Record) -> Iterator[tuple[Pass, Edit, ApplyContext]]:
    """Every edit of a log in order, with its pass and the context of its application."""
    for operation in record.operations:
        passes = passes_of(operation)
        context = ApplyContext(int(operation.recipe["seed"]), operation.kept)
        for edit in operation.edits:
            yield passes[edit.rule], edit, context
