"""Low-rank adapters: one published method per file."""

from architectures.adapters.altlora import AltLoRA
from architectures.adapters.base import Adapter, Init, Matrix, Method, NoOptions
from architectures.adapters.dora import DoRA
from architectures.adapters.lora import LoRA
from architectures.adapters.lora_pro import LoRAPro
from architectures.adapters.nora import NoRA, NoRAPlus
from architectures.adapters.olora import OLoRA
from architectures.adapters.pissa import PiSSA
from architectures.adapters.reflora import RefLoRA
from architectures.adapters.reflora_s import RefLoRAS
from architectures.adapters.scalora import ScaLoRA
from architectures.adapters.sliced import Ranges, Sliced
from architectures.adapters.sorsa import SORSA

__all__ = [
    "SORSA",
    "Adapter",
    "AltLoRA",
    "DoRA",
    "Init",
    "LoRA",
    "LoRAPro",
    "Matrix",
    "Method",
    "NoOptions",
    "NoRA",
    "NoRAPlus",
    "OLoRA",
    "PiSSA",
    "Ranges",
    "RefLoRA",
    "RefLoRAS",
    "ScaLoRA",
    "Sliced",
]
