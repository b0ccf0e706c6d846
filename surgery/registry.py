"""Extension points: passes, adapters, topologies and export formats, found by name.

Nothing is imported until it is used. Another package adds to a registry by declaring an
entry point in the group of that registry::

    [project.entry-points."surgery.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from surgery.errors import RuleError


def suggest(word: str, options: Iterable[str], *, limit: int = 3) -> str:
    """The nearest options as ``did you mean 'a' or 'b'?``, else the list of all options."""
    known = sorted(set(options))
    near = difflib.get_close_matches(word, known, n=limit, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(name) for name in near)}?"
    return f"known: {', '.join(known)}" if known else "none are known"


class Registry:
    """Objects by name, built in or from the entry points of ``group``.

    Args:
        group: Entry-point group other packages register under.
        what: What one entry is called in an error message.
        builtin: name → ``"module:attribute"``, imported when asked for.
    """

    def __init__(self, group: str, what: str, builtin: Mapping[str, str]) -> None:
        self.group = group
        self.what = what
        self._builtin = dict(builtin)
        self._loaded: dict[str, Any] = {}

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """Every registered name, sorted. Imports nothing."""
        return sorted({*self._builtin, *self._plugins})

    def origin(self, name: str) -> str:
        """Where ``name`` comes from, as ``module:attribute``."""
        if name in self._builtin:
            return self._builtin[name]
        return self._plugins[name].value

    def get(self, name: str) -> Any:
        """Import and return the object registered as ``name``.

        Raises:
            RuleError: the name is not registered.
        """
        if name in self._loaded:
            return self._loaded[name]
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            loaded: Any = getattr(importlib.import_module(module), attribute)
        elif name in self._plugins:
            loaded = self._plugins[name].load()
        else:
            raise RuleError(f"unknown {self.what} {name!r}", hint=suggest(name, self.names()))
        self._loaded[name] = loaded
        return loaded


PASSES = Registry(
    "surgery.passes",
    "pass",
    {
        "freeze": "surgery.passes.freeze:Freeze",
        "lowrank": "surgery.passes.lowrank:LowRank",
        "mirror": "surgery.passes.mirror:Mirror",
        "shortcuts": "surgery.passes.shortcuts:Shortcuts",
    },
)
ADAPTERS = Registry(
    "surgery.adapters",
    "method",
    {
        "altlora": "architectures.adapters.altlora:AltLoRA",
        "dora": "architectures.adapters.dora:DoRA",
        "lora": "architectures.adapters.lora:LoRA",
        "lora-pro": "architectures.adapters.lora_pro:LoRAPro",
        "nora": "architectures.adapters.nora:NoRA",
        "nora-plus": "architectures.adapters.nora:NoRAPlus",
        "olora": "architectures.adapters.olora:OLoRA",
        "pissa": "architectures.adapters.pissa:PiSSA",
        "reflora": "architectures.adapters.reflora:RefLoRA",
        "reflora-s": "architectures.adapters.reflora_s:RefLoRAS",
        "scalora": "architectures.adapters.scalora:ScaLoRA",
        "sorsa": "architectures.adapters.sorsa:SORSA",
    },
)
MIRRORS = Registry(
    "surgery.mirrors",
    "map",
    {
        "block_iaf": "architectures.mirror.block_iaf:BlockIAF",
        "diagonal": "architectures.mirror.diagonal:Diagonal",
        "layer_iaf": "architectures.mirror.layer_iaf:LayerIAF",
        "legendre": "architectures.mirror.legendre:Legendre",
    },
)
TOPOLOGIES = Registry(
    "surgery.topologies",
    "topology",
    {
        "ancre": "architectures.shortcuts.ancre:Ancre",
        "denseformer": "architectures.shortcuts.denseformer:DenseFormer",
        "static": "architectures.shortcuts.static:Static",
    },
)
STEP_RULES = Registry(
    "surgery.step_rules",
    "step rule",
    {
        "altlora": "surgery.optim.altlora:AltLoRA",
        "lora-pro": "surgery.optim.lora_pro:LoRAPro",
        "nora-plus": "surgery.optim.nora_plus:NoRAPlus",
        "reflora": "surgery.optim.reflora:RefLoRA",
        "reflora-s": "surgery.optim.reflora_s:RefLoRAS",
        "scalora": "surgery.optim.scalora:ScaLoRA",
    },
)
FORMATS = Registry(
    "surgery.formats",
    "format",
    {
        "diffusers": "surgery.exporting.diffusers:Diffusers",
        "diffusers_lora": "surgery.exporting.diffusers_lora:DiffusersLora",
        "merged": "surgery.exporting.merged:Merged",
        "peft": "surgery.exporting.peft:Peft",
        "onnx": "surgery.exporting.onnx:Onnx",
        "python": "surgery.exporting.python:Python",
        "torch_export": "surgery.exporting.torch_export:TorchExport",
        "transformers": "surgery.exporting.transformers:Transformers",
    },
)
