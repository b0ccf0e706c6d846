"""The optimizer's side of a method. Imports torch and nothing else."""

from __future__ import annotations

from surgery.optim.galore import GaLoreAdamW
from surgery.optim.projection import MODES, Mode, state_elements

__all__ = ["MODES", "GaLoreAdamW", "Mode", "state_elements"]
