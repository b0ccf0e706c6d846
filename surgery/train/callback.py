"""Rewritten models in the Trainer of transformers, which is imported with this module.

In short::

    trainer = Trainer(model=model, args=args, callbacks=[SurgeryCallback()], ...)
    trainer.train()                                  # or train(resume_from_checkpoint=True)
    model = surgery.restore("out/checkpoint-500")
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from surgery import adapters
from surgery.capture.graft import graft, grafts
from surgery.checkpoints import save
from surgery.errors import CheckpointError, ExportError, ModelStateError
from surgery.optim.rule import PREFIX
from surgery.passes.lowrank import LowRank
from surgery.record import Record, record_of
from surgery.save_guard import not_baked
from surgery.train import checkpoints
from surgery.train.engine import accelerate

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

_MANIFEST = "surgery.json"
_RULES = "surgery-rules"


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
    attached to the optimizer, after whatever accelerate did to it. What they keep is saved with
    every checkpoint, so that ``resume_from_checkpoint`` goes on exactly.

    SORSA's penalty is no matter of the optimizer: add ``surgery.adapters.penalty(model)`` in
    ``Trainer.compute_loss``; the callback refuses a model that has one, unless told.

    Args:
        penalty_added: That ``compute_loss`` adds the penalty.
        resume_from: The checkpoint that ``train(resume_from_checkpoint=...)`` is given, where it is
            not one of ``args.output_dir``.
    """

    def __init__(
        self,
        *,
        penalty_added: bool = False,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self._penalty_added = penalty_added
        self._resume_from = resume_from
        self._prepared: Optimizer | None = None

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
            CheckpointError: what the rules kept is missing, or is of another checkpoint.
        """
        model, optimizer = cast("nn.Module", kwargs["model"]), plain(kwargs["optimizer"])
        record = record_of(model) or Record()
        if not any(edit.pass_name == LowRank.name for edit in record.edits):
            return
        self._check_penalty(model)
        if optimizer is self._prepared:
            return
        # The Trainer has loaded it before there was a rule that could have taken its part.
        loaded = optimizer.state_dict()
        rules = adapters.prepare(model, optimizer).rules
        if rules and state.global_step:
            folder = self._resume_from or _checkpoint(args, state)
            optimizer.load_state_dict(_exact(loaded, Path(folder)))
        self._prepared = optimizer

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write what the rules keep beside the Trainer's files.

        It is in the optimizer's state too, but torch rounds that to the dtype of the adapters
        when it is loaded.
        """
        if not state.is_world_process_zero or self._prepared is None:
            return
        kept = _ruled(self._prepared.state_dict())
        if kept:
            checkpoints.write_state(_cleared(_checkpoint(args, state)), kept, _RULES)

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
    wrapper: type = accelerate("optimizer").AcceleratedOptimizer
    return optimizer.optimizer if isinstance(optimizer, wrapper) else optimizer


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _cleared(folder: Path) -> Path:
    """A checkpoint's folder without what an earlier training left there."""
    for ending in (".json", ".safetensors"):
        (folder / f"{_RULES}{ending}").unlink(missing_ok=True)
    return folder


def _ruled(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What rules keep in an optimizer's state: number of the parameter → name → tensor."""
    kept = {
        str(index): {key: value for key, value in own.items() if key.startswith(PREFIX)}
        for index, own in state["state"].items()
    }
    return {index: own for index, own in kept.items() if own}


def _exact(loaded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An optimizer's state with what rules kept in all its bits.

    Raises:
        CheckpointError: that is missing, or is not what the state holds but for its rounding.
    """
    if not (folder / f"{_RULES}.json").is_file():
        raise CheckpointError(
            f"{folder} does not hold what the step rules of the adapters kept ({_RULES}.json)",
            hint="resume a training that had the SurgeryCallback; if the checkpoint lies in "
            "another folder than output_dir, name it: SurgeryCallback(resume_from=...)",
        )
    exact: dict[str, dict[str, Tensor]] = checkpoints.read_state(folder, _RULES)
    state = {index: dict(own) for index, own in loaded["state"].items()}
    for index, own in _ruled(loaded).items():
        for key, rounded in own.items():
            kept = exact.get(index, {}).get(key)
            if kept is None or not _rounds_to(kept, rounded):
                raise CheckpointError(
                    f"{folder / _RULES}.json is of another checkpoint than the optimizer's state",
                    hint="name the checkpoint: SurgeryCallback(resume_from=...)",
                )
            state[int(index)][key] = kept
    return {**loaded, "state": state}


def _rounds_to(exact: Tensor, rounded: Tensor) -> bool:
    same = exact.to(rounded).isclose(rounded, rtol=0, atol=0, equal_nan=True)
    return exact.shape == rounded.shape and bool(same.all())


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
