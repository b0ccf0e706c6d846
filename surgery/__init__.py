"""Declarative model surgery for PyTorch.

Rewrite the architecture of a model you did not write with a short rule file: see the plan, apply
it in place, prove what changed, undo it, save it, restore it::

    model = surgery.load("timm:vit_small_patch16_224")
    plan = surgery.plan(model, "rules.yaml")
    print(plan)
    plan.apply()
    print(surgery.verify(model))
    surgery.undo(model)

Names are imported when they are first used: ``import surgery`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery.version import __version__ as __version__

if TYPE_CHECKING:
    from surgery import adapters, capture, mirrors
    from surgery.checkpoints import (
        KeyMap,
        keymap,
        load_weights,
        materialize,
        restore,
        save,
        stock_weights,
    )
    from surgery.conversion import Converted, convert
    from surgery.editing import undo
    from surgery.errors import (
        CaptureError,
        CheckpointError,
        ConfigError,
        Conflict,
        ContractBroken,
        DataError,
        ExportError,
        ModelStateError,
        NoMatch,
        RuleError,
        SourceError,
        SurgeryError,
        TrainingError,
    )
    from surgery.exporting import Exported, export
    from surgery.inspection import Inspection, inspect
    from surgery.interchange import load_adapter
    from surgery.passes.freeze import Freeze
    from surgery.passes.lowrank import LowRank
    from surgery.passes.mirror import Mirror
    from surgery.passes.shortcuts import Shortcuts
    from surgery.passes.streams import parameter_groups, shortcuts
    from surgery.planning import Plan, apply, plan
    from surgery.proving import Proof, prove
    from surgery.rules import (
        CreatedBy,
        Layers,
        Path,
        Recipe,
        Role,
        Rule,
        Shape,
        Stack,
        Type,
        Where,
    )
    from surgery.sources import Example, load
    from surgery.train.adapt.config import AdaptConfig
    from surgery.train.adapt.run import adapt
    from surgery.train.config import PretrainConfig
    from surgery.train.finetune.config import FinetuneConfig
    from surgery.train.finetune.run import finetune
    from surgery.train.run import pretrain
    from surgery.verification import Report, verify

_HOMES: dict[str, tuple[str, ...]] = {
    "surgery.editing": ("undo",),
    "surgery.checkpoints": (
        "KeyMap",
        "keymap",
        "load_weights",
        "materialize",
        "restore",
        "save",
        "stock_weights",
    ),
    "surgery.conversion": ("Converted", "convert"),
    "surgery.errors": (
        "CaptureError",
        "CheckpointError",
        "ConfigError",
        "Conflict",
        "ContractBroken",
        "DataError",
        "ExportError",
        "ModelStateError",
        "NoMatch",
        "RuleError",
        "SourceError",
        "SurgeryError",
        "TrainingError",
    ),
    "surgery.exporting": ("Exported", "export"),
    "surgery.inspection": ("Inspection", "inspect"),
    "surgery.interchange": ("load_adapter",),
    "surgery.passes.freeze": ("Freeze",),
    "surgery.passes.lowrank": ("LowRank",),
    "surgery.passes.mirror": ("Mirror",),
    "surgery.passes.shortcuts": ("Shortcuts",),
    "surgery.passes.streams": ("parameter_groups", "shortcuts"),
    "surgery.planning": ("Plan", "apply", "plan"),
    "surgery.proving": ("Proof", "prove"),
    "surgery.rules": (
        "CreatedBy",
        "Layers",
        "Path",
        "Recipe",
        "Role",
        "Rule",
        "Shape",
        "Stack",
        "Type",
        "Where",
    ),
    "surgery.sources": ("Example", "load"),
    "surgery.train.adapt.config": ("AdaptConfig",),
    "surgery.train.adapt.run": ("adapt",),
    "surgery.train.config": ("PretrainConfig",),
    "surgery.train.finetune.config": ("FinetuneConfig",),
    "surgery.train.finetune.run": ("finetune",),
    "surgery.train.run": ("pretrain",),
    "surgery.verification": ("Report", "verify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("adapters", "capture", "mirrors")

__all__ = [
    "AdaptConfig",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "Conflict",
    "ContractBroken",
    "Converted",
    "CreatedBy",
    "DataError",
    "Example",
    "ExportError",
    "Exported",
    "FinetuneConfig",
    "Freeze",
    "Inspection",
    "KeyMap",
    "Layers",
    "LowRank",
    "Mirror",
    "ModelStateError",
    "NoMatch",
    "Path",
    "Plan",
    "PretrainConfig",
    "Proof",
    "Recipe",
    "Report",
    "Role",
    "Rule",
    "RuleError",
    "Shape",
    "Shortcuts",
    "SourceError",
    "Stack",
    "SurgeryError",
    "TrainingError",
    "Type",
    "Where",
    "adapt",
    "adapters",
    "apply",
    "capture",
    "convert",
    "export",
    "finetune",
    "inspect",
    "keymap",
    "load",
    "load_adapter",
    "load_weights",
    "materialize",
    "mirrors",
    "parameter_groups",
    "plan",
    "pretrain",
    "prove",
    "restore",
    "save",
    "shortcuts",
    "stock_weights",
    "undo",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"surgery.{name}")
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
