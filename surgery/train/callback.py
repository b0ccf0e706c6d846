"""Rewritten models in the Trainer of transformers, which is imported with this module.

In short::

    trainer = Trainer(model=model, args=args, callbacks=[SurgeryCallback()], ...)
    trainer.train()                                  # or train(resume_from_checkpoint=True)
    model = surgery.restore("out/checkpoint-500")
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from surgery import adapters
from surgery.capture.graft import graft, grafts
from surgery.checkpoints import save
from surgery.errors import ExportError, ModelStateError, TrainingError
from surgery.optim.rule import PREFIX
from surgery.passes.lowrank import LowRank
from surgery.record import Record, record_of
from surgery.save_guard import not_baked

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

_MANIFEST = "surgery.json"
_WHOLE = (torch.float32, torch.float64)


class SavedWhole(_Module):
    """Put over a rewritten model, so that the Trainer's checkpoints hold its rewrites.

    Beside the Trainer's own files there is then what ``surgery.save`` writes. Without a
    ``config.json`` no stock class takes the folder for a model of the old architecture, and the
    Trainer finds ``model.safetensors`` in it when it resumes.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the rewritten model; one whose stock weights say it all, as its library does.

        Raises:
            ExportError: the Trainer hands over gathered weights, as under FSDP and DeepSpeed.
        """
        if not not_baked(self, record_of(self) or Record()):
            return super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
            )
        if state_dict is not None:
            raise ExportError(
                "the Trainer saves gathered weights here, and a rewritten model is saved as it is",
                hint="train on one device or under DDP; surgery finetune does FSDP2",
            )
        if is_main_process:
            _save_into(self, Path(save_directory))
        return None


class SurgeryCallback(TrainerCallback):
    """Makes the Trainer train a rewritten model as its methods ask for, and save it.

    At the start of training the step rules of the adapters (RefLoRA, ScaLoRA, LoRA-Pro, ...) are
    attached to the optimizer, after whatever accelerate did to it. What they keep travels in the
    optimizer's state, so that ``resume_from_checkpoint`` goes on exactly.

    SORSA's penalty is no matter of the optimizer: add ``surgery.adapters.penalty(model)`` in
    ``Trainer.compute_loss``; the callback refuses a model that has one, unless told.

    Args:
        penalty_added: That ``compute_loss`` adds the penalty.
        prepared: The plain optimizer that was given to the Trainer (``optimizers=``), where
            ``surgery.adapters.prepare`` was called on it before. Adapters in bfloat16 or float16
            need that for a resume, since the Trainer's way through torch would round what rules
            keep.
    """

    def __init__(self, *, penalty_added: bool = False, prepared: Optimizer | None = None) -> None:
        self._penalty_added = penalty_added
        self._prepared = prepared

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Have checkpoints hold the rewrites.

        Raises:
            ModelStateError: the Trainer has no model yet, or one that was not rewritten.
        """
        model = cast("nn.Module | None", kwargs.get("model"))
        if model is None or record_of(model) is None:
            raise ModelStateError(
                "SurgeryCallback is for a rewritten model, and the Trainer's is "
                f"{'none yet' if model is None else type(model).__name__ + ' as it came'}",
                hint="surgery.apply(model, rules), then Trainer(model=model, ...)",
            )
        if SavedWhole not in grafts(model):
            graft(model, SavedWhole)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Attach the step rules, with what a checkpoint holds of them.

        Raises:
            ModelStateError: a method adds a penalty to the loss, and nothing adds it.
            TrainingError: low-precision adapters are resumed through the Trainer.
        """
        model, optimizer = cast("nn.Module", kwargs["model"]), plain(kwargs["optimizer"])
        record = record_of(model) or Record()
        if not any(edit.pass_name == LowRank.name for edit in record.edits):
            return
        self._check_penalty(model)
        if optimizer is self._prepared:
            return
        loaded = optimizer.state_dict()
        _check_exact(optimizer)
        adapters.prepare(model, optimizer)
        if state.global_step:
            # The Trainer has loaded it before there was a rule that could have taken its part.
            optimizer.load_state_dict(loaded)
        self._prepared = optimizer

    def _check_penalty(self, model: nn.Module) -> None:
        if self._penalty_added or not adapters.penalty(model).requires_grad:
            return
        raise ModelStateError(
            "a method of the adapters adds a penalty to the loss, which the Trainer knows nothing "
            "of",
            hint="add surgery.adapters.penalty(model) in Trainer.compute_loss, and say so: "
            "SurgeryCallback(penalty_added=True)",
        )


def plain(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's, if it is one."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _check_exact(optimizer: Optimizer) -> None:
    for parameter, kept in optimizer.state.items():
        ruled = any(isinstance(key, str) and key.startswith(PREFIX) for key in kept)
        if ruled and parameter.dtype not in _WHOLE:
            raise TrainingError(
                f"adapters of {parameter.dtype} cannot be resumed exactly: torch has rounded what "
                "their step rule keeps",
                hint="surgery.adapters.prepare(model, optimizer) before, then "
                "Trainer(optimizers=(optimizer, None), callbacks=[SurgeryCallback("
                "prepared=optimizer)])",
            )


def _save_into(model: nn.Module, folder: Path) -> None:
    """What ``surgery.save`` writes, among the Trainer's files; the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        made = save(model, Path(work) / "model")
        files = [path for path in made.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == _MANIFEST):
            target = folder / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
