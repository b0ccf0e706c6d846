"""The dry run: what a recipe would do to a model, before anything is changed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from surgery.editing import carry_out
from surgery.errors import Conflict, ModelStateError, NoMatch, RuleError, SurgeryError
from surgery.passes.base import Pass, PlanContext, spared
from surgery.preflight import preflight
from surgery.record import Contract, Edit, Operation, Record, record_of
from surgery.rules import Recipe, Rule
from surgery.select import ModelMap, Selection, select
from surgery.table import collapse, human_bytes, human_count, render
from surgery.tree import named_modules, named_parameters, own_parameters

if TYPE_CHECKING:
    from rich.console import Group

T = TypeVar("T")
RecipeLike = Recipe | Rule | Sequence[Rule] | str | PathLike[str]


@dataclass(frozen=True)
class Totals:
    """Sizes before and after, as the plan predicts them.

    Attributes:
        parameters: Elements in the model's parameters now.
        added: Elements in the tensors that would be added.
        added_bytes: Their size in bytes.
        trainable: Trainable elements afterwards.
    """

    parameters: int
    added: int
    added_bytes: int
    trainable: int

    @property
    def trainable_share(self) -> float:
        """Trainable elements over all elements, afterwards."""
        return self.trainable / max(self.parameters + self.added, 1)


@dataclass(frozen=True)
class Plan:
    """Everything a recipe would do to one model. ``print(plan)`` shows it as a table.

    Attributes:
        model: The model it was made for; unchanged until ``apply``.
        recipe: The recipe.
        edits: Every edit in the order it would be carried out.
        warnings: What looks accidental, such as a rule that matched 25 of 30 layers.
        near: Rule id → sites that came closest without matching, each with the reason.
        unmatched: Ids of optional rules that matched nothing.
        totals: Predicted sizes.
    """

    model: nn.Module
    recipe: Recipe
    edits: tuple[Edit, ...]
    warnings: tuple[str, ...]
    near: Mapping[str, tuple[tuple[str, str], ...]]
    unmatched: tuple[str, ...]
    totals: Totals
    passes: Mapping[str, Pass] = field(repr=False)
    fingerprint: str = field(repr=False)

    @property
    def contract(self) -> Contract:
        """What all edits together promise."""
        return Contract.weakest(edit.contract for edit in self.edits)

    def apply(self, *, copy: bool = False) -> nn.Module:
        """Carry the plan out.

        Args:
            copy: Rewrite a deep copy and leave the model as it is.

        Returns:
            The model itself, or the rewritten copy.

        Raises:
            ModelStateError: the model is no longer what the plan was made for.
        """
        if fingerprint(self.model) != self.fingerprint:
            raise ModelStateError(
                "the model changed since this plan was made",
                hint="make the plan again; a plan can be applied once",
            )
        target = _deepcopy(self.model) if copy else self.model
        carry_out(target, Operation(self.recipe.dump(), list(self.edits)), self.passes)
        return target

    def code(self) -> dict[str, str]:
        """``Class.method`` → the Python that would take its place, of everything rewritten."""
        found: dict[str, str] = {}
        for edit in self.edits:
            found.update(self.passes[edit.rule].code(self.model, edit))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data, every edit listed."""
        return {
            "recipe": self.recipe.dump(),
            "contract": str(self.contract),
            "edits": [edit.to_dict() for edit in self.edits],
            "totals": {
                "parameters": self.totals.parameters,
                "added": self.totals.added,
                "added_bytes": self.totals.added_bytes,
                "trainable": self.totals.trainable,
                "trainable_share": self.totals.trainable_share,
            },
            "warnings": list(self.warnings),
            "unmatched": list(self.unmatched),
            "near": {rule: [list(pair) for pair in misses] for rule, misses in self.near.items()},
        }

    def view(self, *, full: bool = False) -> Group:
        """The plan for a rich console.

        Args:
            full: One row per site instead of one per run of like sites.
        """
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        runs = _rows(self.edits, full=full)
        sites = [collapse([edit.site for edit in rows]) for rows in runs]
        table = Table(title=self._title())
        # A site's name is folded, never cut: it is what a rule has to say.
        widths = {"site": min(32, max(map(len, sites), default=0)), "contract": len("contract")}
        for name in ("rule", "site", "edit", "new", "contract"):
            table.add_column(name, overflow="fold", min_width=widths.get(name))
        for rows, site in zip(runs, sites, strict=True):
            edit = rows[0]
            added = sum(spec.numel for row in rows for spec in row.adds.values())
            table.add_row(edit.rule, site, edit.summary, human_count(added), str(edit.contract))
        notes = [Text(f"note: {note}") for note in _notes(self.edits)]
        warnings = [Text(f"warning: {text}", style="yellow") for text in self.warnings]
        unmatched = [Text(f"optional rule {rule!r} matched nothing") for rule in self.unmatched]
        return Group(table, Text(self._totals_line()), *notes, *warnings, *unmatched, *self._near())

    def __rich__(self) -> Group:
        return self.view()

    def __str__(self) -> str:
        return render(self.view())

    def _title(self) -> str:
        count = len(self.edits)
        return f"{self.recipe.recipe}: {count} edit{'' if count == 1 else 's'}"

    def _totals_line(self) -> str:
        totals = self.totals
        return (
            f"{human_count(totals.parameters)} parameters + {human_count(totals.added)} new "
            f"({human_bytes(totals.added_bytes)}); trainable afterwards "
            f"{human_count(totals.trainable)} ({totals.trainable_share:.3%}); "
            f"contract {self.contract}"
        )

    def _near(self) -> list[Any]:
        from rich.text import Text

        lines: list[Any] = []
        for rule, misses in self.near.items():
            if misses:
                lines.append(Text(f"nearest sites that rule {rule!r} left out:", style="dim"))
                lines.extend(Text(f"  {path}: {why}", style="dim") for path, why in misses)
        return lines


def plan(model: nn.Module, recipe: RecipeLike, *, example: Any = None) -> Plan:
    """Work out what a recipe would do to a model. Changes nothing.

    Args:
        model: Any ``nn.Module``; ``surgery.load`` is not required.
        recipe: A ``Recipe``, a ``Rule``, a sequence of rules, or the path of a rule file.
        example: A tensor, a tuple of positional or a dict of keyword arguments, or an
            ``Example``. Inferred where the model carries a config; used only by rules that must
            see the forward run, such as those that select by role.

    Raises:
        RuleError: the recipe is wrong, or an option does not suit a site.
        NoMatch: a rule that is not optional matched nothing.
        Conflict: two edits do not go together, or another tool rewrote the model.
        ModelStateError: the model is compiled, wrapped or offloaded.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelStateError(
            f"expected an nn.Module, received {type(model).__name__}",
            hint="load one with surgery.load('timm:NAME'), or pass your own model",
        )
    wanted = as_recipe(recipe)
    preflight(model)
    sites = ModelMap(model, example)
    edits: list[Edit] = []
    warnings: list[str] = []
    near: dict[str, tuple[tuple[str, str], ...]] = {}
    unmatched: list[str] = []
    passes: dict[str, Pass] = {}
    for rule in wanted.rules:
        made = cast("Pass", rule.options)
        chosen = _choose(sites, rule, made)
        near[rule.id] = chosen.near
        if not chosen.matched:
            unmatched.append(rule.id)
            continue
        passes[rule.id] = made
        warnings.extend(f"rule {rule.id!r}: {text}" for text in chosen.warnings)
        context = PlanContext(model, sites, rule.id, wanted.seed, tuple(edits), record_of(model))
        proposed = _propose(rule, made, chosen, context)
        warnings.extend(f"rule {rule.id!r}: {text}" for text in made.warnings(proposed, context))
        edits.extend(proposed)
        sites = sites.with_created(rule.id, [name for edit in proposed for name in edit.adds])
    return Plan(
        model=model,
        recipe=wanted,
        edits=tuple(edits),
        warnings=tuple(warnings),
        near=near,
        unmatched=tuple(unmatched),
        totals=_totals(model, edits, passes),
        passes=passes,
        fingerprint=fingerprint(model),
    )


def apply(
    model: nn.Module, recipe: RecipeLike, *, example: Any = None, copy: bool = False
) -> nn.Module:
    """Plan a recipe and carry it out: ``plan(model, recipe, example=example).apply()``.

    Returns:
        The model itself, rewritten in place, or with ``copy`` a rewritten deep copy.

    Raises:
        SurgeryError: whatever ``plan`` or the passes raise; the model is as it was then.
    """
    return plan(model, recipe, example=example).apply(copy=copy)


def as_recipe(recipe: RecipeLike) -> Recipe:
    """A recipe from what the public functions accept.

    Raises:
        RuleError: it is none of them, or the rule file is wrong.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Rule):
        return Recipe(rules=[recipe])
    if isinstance(recipe, str | PathLike):
        return Recipe.load(recipe)
    rules = list(recipe) if isinstance(recipe, list | tuple) else []
    if rules and all(isinstance(rule, Rule) for rule in rules):  # pyright: ignore[reportUnnecessaryIsInstance]
        return Recipe(rules=rules)
    raise RuleError(
        f"expected a recipe, received {type(recipe).__name__}",
        hint="pass a Recipe, a Rule, a list of rules, or the path of a rule file",
    )


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's structure: module classes, parameter names, shapes and dtypes."""
    digest = hashlib.sha256()
    for path, module in named_modules(model):
        digest.update(f"{path}:{id(type(module))};".encode())
        for name, tensor in own_parameters(module).items():
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
    return digest.hexdigest()


def _choose(sites: ModelMap, rule: Rule, made: Pass) -> Selection:
    chosen = _named(rule, lambda: _selected(sites, rule, made))
    if chosen.matched or rule.optional:
        return chosen
    misses = "\n".join(f"    {path}: {why}" for path, why in chosen.near)
    raise NoMatch(
        f"rule {rule.id!r} (pass {made.name}) matched nothing in this model"
        + (f"; nearest:\n{misses}" if misses else ""),
        hint="surgery.inspect(model) lists what a rule can name; optional: true allows no match",
    )


def _selected(sites: ModelMap, rule: Rule, made: Pass) -> Selection:
    return select(sites, rule.where, rule.except_, made.chooser(sites, rule.where))


def _propose(rule: Rule, made: Pass, chosen: Selection, context: PlanContext) -> Sequence[Edit]:
    proposed = _named(rule, lambda: made.propose(chosen.matched, context))
    before = [] if context.record is None else context.record.edits
    _refuse_conflicts(proposed, _in_the_way(before), applied=True)
    _refuse_conflicts(proposed, context.earlier, applied=False)
    return proposed


def _in_the_way(before: Sequence[Edit]) -> list[Edit]:
    """Edits in force, but for those that lost all they added, as a map that was baked in did."""
    left: list[Edit] = []
    gone: set[str] = set()
    for edit in reversed(before):
        if not edit.adds or not gone.issuperset(edit.adds):
            left.append(edit)
        gone = (gone - edit.adds.keys()) | set(edit.removes)
    return left[::-1]


def _refuse_conflicts(proposed: Sequence[Edit], others: Sequence[Edit], *, applied: bool) -> None:
    """Raise if a proposed edit and another use one thing in ways that do not commute."""
    users: dict[str, list[Edit]] = {}
    for other in others:
        for thing in other.uses:
            users.setdefault(thing, []).append(other)
    for edit in proposed:
        for thing, use in edit.uses.items():
            for other in users.get(thing, ()):
                if use == "extend" and other.uses[thing] == "extend":
                    continue
                way_out = (
                    "undo the earlier one first" if applied else "keep them apart with except:"
                )
                if {edit.pass_name, other.pass_name} == {"lowrank"}:
                    way_out += ", or give their adapters different names (adapter: NAME)"
                when = "was applied to this model before" if applied else "comes earlier"
                raise Conflict(
                    f"rules {other.rule!r} and {edit.rule!r} both change {thing} at "
                    f"{edit.site}: {other.rule!r} ({other.summary}) {when}, "
                    f"{edit.rule!r} would {edit.summary}",
                    hint=way_out,
                )


def _named(rule: Rule, call: Callable[[], T]) -> T:
    """Run ``call`` and put the rule's id in front of any error's message."""
    try:
        return call()
    except SurgeryError as error:
        named = copy.copy(error)
        named.message = f"rule {rule.id!r}: {error.message}"
        raise named from None


def _totals(model: nn.Module, edits: Sequence[Edit], passes: Mapping[str, Pass]) -> Totals:
    added = {name: spec for edit in edits for name, spec in edit.adds.items()}
    kept = spared(record_of(model) or Record(), edits, passes)
    frozen: set[str] = set()
    for rule, made in passes.items():
        own = [edit for edit in edits if edit.rule == rule]
        frozen.update(made.frozen(model, own, kept))
    still = frozen.union(*(edit.removes for edit in edits))
    stock = dict(named_parameters(model, duplicates=False))
    trainable = sum(p.numel() for name, p in stock.items() if p.requires_grad and name not in still)
    return Totals(
        parameters=sum(p.numel() for p in stock.values()),
        added=sum(spec.numel for spec in added.values()),
        added_bytes=sum(spec.nbytes for spec in added.values()),
        trainable=trainable + sum(spec.numel for spec in added.values() if spec.trainable),
    )


def _rows(edits: Sequence[Edit], *, full: bool) -> list[list[Edit]]:
    """Edits that make one row of the table: alike but for the numbers in their sites."""
    if full:
        return [[edit] for edit in edits]
    rows: dict[tuple[str, ...], list[Edit]] = {}
    for edit in edits:
        pattern = ".".join("#" if part.isdigit() else part for part in edit.site.split("."))
        rows.setdefault((edit.rule, pattern, edit.summary, str(edit.contract)), []).append(edit)
    return list(rows.values())


def _notes(edits: Sequence[Edit]) -> list[str]:
    return list(dict.fromkeys(f"{edit.site}: {note}" for edit in edits for note in edit.notes))


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
