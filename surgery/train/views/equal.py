"""Steps to equal loss: when a run is as good as the baseline was at its end.

The target is the baseline's last evaluation loss. A run reaches it at the first step at which the
evaluation loss, taken as linear between two evaluations, is not above the target. What is saved
is the baseline's number of steps less that step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from surgery.train.views.runs import Group, Record, Series


@dataclass(frozen=True)
class Reach:
    """One run against the baseline run of the same seed.

    Attributes:
        seed: Of both.
        target: The baseline's last evaluation loss.
        steps: The step at which the baseline had it.
        reached: The step at which this run first had it; None if it never did.
    """

    seed: int | None
    target: float
    steps: int
    reached: float | None

    @property
    def saved(self) -> float | None:
        """Part of the baseline's steps that were not needed; below zero if more were."""
        return None if self.reached is None else 1 - self.reached / self.steps

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {**asdict(self), "saved": self.saved}

    def __str__(self) -> str:
        if self.reached is None or self.saved is None:
            return f"loss {self.target:.4g} not reached"
        when = f"step {self.reached:.0f} of {self.steps}"
        return f"loss {self.target:.4g} at {when}, {percent(self.saved)}"


@dataclass(frozen=True)
class Saving:
    """The runs of one configuration against the baseline's, seed by seed.

    Attributes:
        name: Of the configuration.
        baseline: Name of the baseline.
        runs: One for each seed that both have and whose baseline has an evaluation.
        unpaired: Seeds that have no such partner.
    """

    name: str
    baseline: str
    runs: tuple[Reach, ...]
    unpaired: tuple[int | None, ...]

    @property
    def reached(self) -> int:
        """In how many of the runs the loss was reached."""
        return sum(run.reached is not None for run in self.runs)

    @property
    def saved(self) -> tuple[float, float | None] | None:
        """Mean part of steps saved, and its standard deviation over seeds where there are two.

        None unless every run reached the loss: a mean over those that did would flatter.
        """
        parts = [run.saved for run in self.runs if run.saved is not None]
        if not parts or len(parts) < len(self.runs):
            return None
        return statistics.fmean(parts), statistics.stdev(parts) if len(parts) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        mean, spread = self.saved or (None, None)
        return {
            "name": self.name,
            "baseline": self.baseline,
            "saved": mean,
            "spread": spread,
            "reached": self.reached,
            "runs": [run.to_dict() for run in self.runs],
            "unpaired": list(self.unpaired),
        }

    def __str__(self) -> str:
        if not self.runs:
            return f"no seed in common with {self.baseline}"
        if len(self.runs) == 1:
            return str(self.runs[0])
        found = self.saved
        if found is None:
            return f"loss of {self.baseline} reached in {self.reached} of {len(self.runs)} seeds"
        mean, spread = found
        share = f"{100 * abs(mean):.0f} ± {100 * (spread or 0.0):.0f}%"
        return f"{share} {'fewer' if mean >= 0 else 'more'} steps ({len(self.runs)} seeds)"


def percent(saved: float) -> str:
    """``34% fewer steps``, or ``12% more steps``."""
    return f"{abs(100 * saved):.0f}% {'fewer' if saved >= 0 else 'more'} steps"


def first_reach(evaluation: Series, target: float) -> float | None:
    """The first step at which a loss is not above ``target``; None if there is none.

    Linear between two evaluations. Where the one before is not finite there is nothing to
    interpolate from, and the step of the evaluation itself counts.
    """
    before: tuple[float, float] | None = None
    for step, loss in zip(evaluation.steps.tolist(), evaluation.values.tolist(), strict=True):
        if loss <= target:
            return float(step) if before is None else _crossing(before, (step, loss), target)
        before = (step, loss) if math.isfinite(loss) else None
    return None


def _crossing(before: tuple[float, float], after: tuple[float, float], target: float) -> float:
    (start, high), (end, low) = before, after
    return start + (end - start) * (high - target) / (high - low)


def target_of(run: Record) -> tuple[int, float] | None:
    """Step and loss of a run's last evaluation; None if there is none or it is not finite."""
    series = run.evaluation
    if not len(series) or not math.isfinite(series.values[-1]) or series.steps[-1] < 1:
        return None
    return int(series.steps[-1]), float(series.values[-1])


def savings(groups: Sequence[Group]) -> list[Saving]:
    """Every group but the first against the first, which is the baseline."""
    if not groups:
        return []
    baseline, *others = groups
    return [_saving(other, baseline) for other in others]


def _saving(group: Group, baseline: Group) -> Saving:
    targets = {run.seed: target_of(run) for run in baseline.runs}
    # Runs without a seed, or one run on either side: there is one way to pair them.
    if len(group.runs) == len(baseline.runs) == 1:
        targets = {group.runs[0].seed: target_of(baseline.runs[0])}
    found: list[Reach] = []
    unpaired: list[int | None] = []
    for run in group.runs:
        target = targets.get(run.seed)
        if target is None:
            unpaired.append(run.seed)
            continue
        steps, loss = target
        found.append(Reach(run.seed, loss, steps, first_reach(run.evaluation, loss)))
    return Saving(group.name, baseline.name, tuple(found), tuple(unpaired))
