"""The optimizer's side of a method."""

from __future__ import annotations

from surgery.optim.galore import GaLoreAdamW
from surgery.optim.projection import MODES, Mode, state_elements
from surgery.optim.rule import Attached, Factors, StepRule

__all__ = [
    "MODES",
    "Attached",
    "Factors",
    "GaLoreAdamW",
    "Mode",
    "StepRule",
    "state_elements",
]
