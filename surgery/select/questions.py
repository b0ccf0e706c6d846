"""A rule's condition as questions about a site, each answered with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from surgery.registry import suggest
from surgery.rules import match as rules
from surgery.rules.where import Sizes, Where
from surgery.select.match import Match
from surgery.select.model_map import ModelMap
from surgery.select.nearness import path_distance, sizes_distance, word_distance
from surgery.select.roles import Role
from surgery.select.sites import Site
from surgery.select.stacks import Stack

Ask = Callable[[Site], Match]

# A miss is never at distance 0, however much alike the words are.
_LEAST = 0.01


@dataclass(frozen=True)
class Question:
    """One thing a site must satisfy.

    Attributes:
        ask: The answer for a site.
        traces: Whether answering takes a trace of the model.
    """

    ask: Ask
    traces: bool = False


def questions_of(sites: ModelMap, where: Where) -> tuple[Question, ...]:
    """The questions that make up a condition. All of them must be answered with yes."""
    asked: list[Question] = []
    if where.created_by:
        asked.append(Question(lambda site: _created_by(where.created_by, site)))
    if where.path:
        asked.append(Question(lambda site: _path(sites, where.path, site)))
    if where.type:
        asked.append(Question(lambda site: _type(where.type, site)))
    if where.stack or where.layers:
        asked.append(_position_question(sites, where))
    if where.shape:
        asked.append(Question(lambda site: _shape(where.shape, site)))
    if where.role:
        asked.append(Question(lambda site: _role(where.role, sites.role(site)), traces=True))
    if where.any_:
        branches = [questions_of(sites, branch) for branch in where.any_]
        asked.append(Question(lambda site: _any(branches, site), _trace(branches)))
    if where.not_ is not None:
        denied = questions_of(sites, where.not_)
        asked.append(Question(lambda site: _not(denied, site, "not"), _trace([denied])))
    return tuple(asked)


def exception(sites: ModelMap, where: Where) -> Question:
    """The question whether a site is *not* among a rule's exceptions."""
    denied = questions_of(sites, where)
    return Question(lambda site: _not(denied, site, "except"), _trace([denied]))


def first_no(questions: Iterable[Question], site: Site) -> Match:
    """The first answer that is no, else a yes with the reasons of all."""
    reasons: list[str] = []
    key: str | None = None
    for question in questions:
        answer = question.ask(site)
        if not answer.ok:
            return answer
        reasons.append(answer.reason)
        key = key or answer.key
    return Match.yes("; ".join(reasons) or "every site is meant", key)


def _trace(branches: Iterable[Sequence[Question]]) -> bool:
    return any(question.traces for branch in branches for question in branch)


def _any(branches: Sequence[Sequence[Question]], site: Site) -> Match:
    answers = [first_no(branch, site) for branch in branches]
    return next((a for a in answers if a.ok), min(answers, key=lambda answer: answer.distance))


def _not(denied: Sequence[Question], site: Site, word: str) -> Match:
    answer = first_no(denied, site)
    if answer.ok:
        return Match.no(f"{word}: {answer.reason}", word)
    return Match.yes(f"not excepted: {answer.reason}", word)


def _created_by(wanted: Sequence[str], site: Site) -> Match:
    if site.created_by in wanted:
        return Match.yes(f"made by rule {site.created_by!r}", "created_by")
    maker = "the model came with it" if site.created_by is None else f"made by {site.created_by!r}"
    return Match.no(f"{maker}, the rule asks for what {_or(wanted)} made", "created_by")


def _path(sites: ModelMap, patterns: Sequence[str], site: Site) -> Match:
    paths = sites.aliases(site)
    for pattern in patterns:
        if any(rules.path_matches(pattern, path) for path in paths):
            return Match.yes(f"path matches {pattern!r}", "path")
    distance = min(path_distance(pattern, path) for pattern in patterns for path in paths)
    return Match.no(f"path does not match {_or(patterns)}", "path", max(_LEAST, distance))


def _type(wanted: Sequence[str], site: Site) -> Match:
    for name in wanted:
        if rules.type_matches(name, site.stock):
            return Match.yes(f"it is a {name}", "type")
    bases = [cls.__name__ for cls in site.stock.__mro__[:-2]]
    ends = [name.rpartition(".")[2] for name in wanted]
    distance = max(_LEAST, min(word_distance(end, base) for end in ends for base in bases))
    return Match.no(f"it is a {site.what}, not {_or(wanted, quote=False)}", "type", distance)


def _shape(wanted: Sequence[Sizes], site: Site) -> Match:
    misfits: list[str] = []
    for sizes in wanted:
        misfit = rules.shape_misfit(sizes.comparisons, site.sizes)
        if misfit is None:
            return Match.yes(f"shape fits {sizes.comparisons}", "shape")
        misfits.append(misfit)
    distance = min(sizes_distance(sizes.comparisons, site.sizes) for sizes in wanted)
    return Match.no(f"shape: {' and '.join(misfits)}", "shape", distance)


def _role(wanted: Sequence[str], role: Role) -> Match:
    for name in wanted:
        if any(rules.role_matches(name, played) for played in role.names):
            return Match.yes(f"role {role.name}: {role.reason}", "role")
    if role.name is None:
        return Match.no(f"role: none, {role.reason}; the rule asks for {_or(wanted)}", "role")
    played = " and ".join(role.names)
    groups = {name.partition(".")[0] for name in wanted}
    near = any(name.partition(".")[0] in groups for name in role.names)
    reason = f"role is {played}, the rule asks for {_or(wanted)}"
    return Match.no(reason, "role", 0.4 if near else 0.8)


def _position_question(sites: ModelMap, where: Where) -> Question:
    stacks = _stacks_meant(sites, where.stack)
    index = sites.index(stacks)

    def ask(site: Site) -> Match:
        found = sites.position_in(index, site)
        if found is None:
            return _in_no_stack(sites, where, site)
        stack, at = found
        here = f"layer {at} of {len(stack)} of {stack}"
        if not where.layers:
            return Match.yes(f"it is in {here}", "stack")
        if any(rules.layer_selected(spec, at, len(stack)) for spec in where.layers):
            return Match.yes(f"it is in {here}", "layers")
        return Match.no(f"it is in {here}, not in {_or(where.layers)}", "layers", 0.3)

    return Question(ask)


def stacks_meant(sites: ModelMap, where: Where | None) -> tuple[Stack, ...]:
    """The stacks that a rule speaks of, wherever it does; the outer ones if it names none."""
    parts = [] if where is None else [part for _, part in where.nested()]
    return _stacks_meant(sites, [name for part in parts for name in part.stack])


def _stacks_meant(sites: ModelMap, wanted: Sequence[str]) -> tuple[Stack, ...]:
    """The stacks a condition speaks of; runs inside layers only where a path names them."""
    if not wanted:
        return sites.stacks
    outer = set(sites.stacks)
    named = [name for name in wanted if name not in rules.STACKS]
    meant = [
        stack
        for stack in (sites.all_stacks if named else sites.stacks)
        if any(
            rules.stack_matches(name, stack.path, largest=stack is sites.largest)
            for name in (wanted if stack in outer else named)
        )
    ]
    return tuple(meant)


def _in_no_stack(sites: ModelMap, where: Where, site: Site) -> Match:
    key = "stack" if where.stack else "layers"
    found = sites.position(site)
    if not where.stack or found is None:
        return Match.no("it is in no stack of layers", key)
    known = [stack.path for stack in sites.stacks]
    wanted = _or(where.stack)
    hint = suggest(where.stack[0], known)
    distance = max(_LEAST, min(word_distance(name, found[0].path) for name in where.stack))
    return Match.no(f"it is in stack {found[0]}, not {wanted}; {hint}", key, distance)


def _or(words: Sequence[str], *, quote: bool = True) -> str:
    return " or ".join(repr(word) if quote else word for word in words)
