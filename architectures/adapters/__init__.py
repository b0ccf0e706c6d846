"""Low-rank adapters: one published method per file."""

from architectures.adapters.base import Adapter, Init, Matrix, Method, NoOptions
from architectures.adapters.lora import LoRA
from architectures.adapters.sliced import Ranges, Sliced

__all__ = ["Adapter", "Init", "LoRA", "Matrix", "Method", "NoOptions", "Ranges", "Sliced"]
