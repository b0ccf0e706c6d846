"""Residual topologies, one published method per file, and the mixing of states they ask for."""

from architectures.shortcuts.ancre import Ancre
from architectures.shortcuts.base import Start, Support, Topology, triangle
from architectures.shortcuts.denseformer import DenseFormer
from architectures.shortcuts.history import History, weighted_sum
from architectures.shortcuts.mixer import Mixer
from architectures.shortcuts.static import Static

__all__ = [
    "Ancre",
    "DenseFormer",
    "History",
    "Mixer",
    "Start",
    "Static",
    "Support",
    "Topology",
    "triangle",
    "weighted_sum",
]
