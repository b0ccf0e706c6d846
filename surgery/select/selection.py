"""Which sites a rule means: every site is asked every question until one answer is no."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery.rules.where import Where
from surgery.select.match import Match
from surgery.select.model_map import ModelMap
from surgery.select.partial import warn_of_partial
from surgery.select.questions import Question, exception, first_no, questions_of
from surgery.select.sites import Site

Accepts = Callable[[Site], Match]

NEAREST = 5
"""How many near misses a selection that matched nothing reports."""

# A site that satisfies every selector is the best hint there is, even if the pass refuses it.
_REFUSED = 0.1


@dataclass(frozen=True)
class Selection:
    """What a rule selected, and why everything else was left out.

    Attributes:
        matched: The sites, in module order.
        considered: Path of every site looked at → whether it is meant, with the reason.
        warnings: Partial matches that look accidental.
        near: If nothing matched, the nearest misses as (path, why), nearest first.
    """

    matched: tuple[Site, ...]
    considered: dict[str, Match]
    warnings: tuple[str, ...]
    near: tuple[tuple[str, str], ...]

    @property
    def nearest(self) -> str:
        """The near misses as the end of a message on one line; empty if there are none."""
        misses = "; ".join(f"{path}: {why}" for path, why in self.near)
        return f"; nearest: {misses}" if misses else ""


def select(
    sites: ModelMap, where: Where | None, except_: Where | None, accepts: Accepts
) -> Selection:
    """The sites that satisfy ``where``, do not satisfy ``except_``, and that the pass accepts.

    What can be answered from the module tree is asked first, so that a model is traced for its
    roles only if some site passed everything else. Sites that an earlier rule made are looked at
    only if the rule asks for ``created_by``.

    Args:
        sites: The model's facts.
        where: The rule's condition; None means every site the pass accepts.
        except_: The rule's exceptions.
        accepts: Whether the pass can edit a site at all.

    Raises:
        SourceError: a role is asked for, there is no example and none can be inferred.
        CaptureError: a role is asked for and the model cannot be traced.
    """
    candidates = [s for s in sites.sites if s.created_by is None or _asks_created(where)]
    asked = [] if where is None else [*questions_of(sites, where)]
    if except_ is not None:
        asked.append(exception(sites, except_))
    cheap = [question for question in asked if not question.traces]
    tracing = [question for question in asked if question.traces]
    questions = [*cheap, Question(lambda site: _accepted(accepts, site)), *tracing]
    considered = {site.path: first_no(questions, site) for site in candidates}
    matched = tuple(site for site in candidates if considered[site.path].ok)
    if not matched:
        return Selection((), considered, (), _nearest(cheap, accepts, tracing, candidates))
    return Selection(matched, considered, warn_of_partial(sites, candidates, considered), ())


def _asks_created(where: Where | None) -> bool:
    return where is not None and any(part.created_by for _, part in where.nested())


def _accepted(accepts: Accepts, site: Site) -> Match:
    answer = accepts(site)
    return Match(answer.ok, answer.reason, answer.key, _REFUSED * answer.distance)


def _nearest(
    cheap: Sequence[Question],
    accepts: Accepts,
    tracing: Sequence[Question],
    candidates: Sequence[Site],
) -> tuple[tuple[str, str], ...]:
    """The sites that missed by least; of like sites in several layers only the first."""
    untraced = [*cheap, Question(lambda site: _accepted(accepts, site))]
    # As in the selection itself, a trace is worth its price only if something else passed.
    worth = any(not _misses(untraced, site) for site in candidates)
    asked = [*untraced, *tracing] if worth else untraced
    ranked: list[tuple[float, str, str]] = []
    for site in candidates:
        misses = _misses(asked, site)
        distance = sum(miss.distance for miss in misses)
        ranked.append((distance, site.path, "; ".join(miss.reason for miss in misses)))
    ranked.sort(key=lambda entry: entry[0])
    near: dict[tuple[str, str], tuple[str, str]] = {}
    for _, path, why in ranked:
        alike = (re.sub(r"\d+", "#", path), re.sub(r"\d+", "#", why))
        near.setdefault(alike, (path or "(the model)", why))
        if len(near) == NEAREST:
            break
    return tuple(near.values())


def _misses(questions: Sequence[Question], site: Site) -> list[Match]:
    return [answer for q in questions if not (answer := q.ask(site)).ok]
