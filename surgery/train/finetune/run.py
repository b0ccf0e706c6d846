"""``finetune``: a pretrained model, rules and data become a run folder with the result in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from surgery import adapters, files
from surgery.checkpoints import save
from surgery.checkpoints.swap import replacing
from surgery.errors import ExportError
from surgery.interchange.layers import why_not_low_rank
from surgery.interchange.peft_folder import write_peft
from surgery.record import record_of
from surgery.sources.libraries import installed
from surgery.table import human_count
from surgery.train.finetune.assembly import Built, build
from surgery.train.finetune.source import with_tokenizer
from surgery.train.keeping import Everything, Kept
from surgery.train.run import MODEL, Job, Run, run_job
from surgery.tree import named_parameters

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from surgery.train.data.base import Data
    from surgery.train.finetune.config import FinetuneConfig
    from surgery.train.loop import Tell
    from surgery.train.objectives.base import Objective

ADAPTER = "adapter"
CLASSES = "classes.json"


def finetune(
    config: FinetuneConfig,
    *,
    out: Path,
    resume: bool = False,
    tell: Tell | None = None,
) -> Run:
    """Train a pretrained model: what its rules put in, a new head, or all of it.

    Works alone, under ``accelerate launch`` and under ``torchrun``. Beside what every run leaves,
    the folder gets ``adapter/``, what was trained without the rest of the model, ``tokenizer/`` and
    ``classes.json``.

    Args:
        config: What is trained, on what, and how.
        out: Folder of the run; created.
        resume: Go on from the last checkpoint in ``out``, or start where there is none.
        tell: On the main rank, told a line for people now and then, and its kind: ``step``,
            ``evaluation`` or ``event``.

    Returns:
        Where the result is, and what the last evaluation gave.

    Raises:
        ConfigError: the configuration does not go with the ranks, the device, the launcher or
            itself.
        SourceError: the model cannot be had.
        RuleError: the rules do not fit it.
        DataError: the data is missing or broken.
        ModelStateError: the model does not fit the data or the task.
        CheckpointError: there is a run in ``out`` already, its checkpoint is of another
            configuration or other weights, or the disk is full.
        TrainingError: the loss or a gradient is not finite, and the configuration says to stop; or
            another rank is gone.
    """
    return run_job(Finetuning(config), out=out, resume=resume, tell=tell)


@dataclass
class Finetuning(Job["FinetuneConfig"]):
    """A pretrained model that is trained further.

    Attributes:
        config: The configuration.
        built: Its model, once it was built.
    """

    config: FinetuneConfig
    built: Built | None = None

    def data(self) -> Data:
        """What the section ``data`` names, with the tokenizer of the model."""
        from surgery.train.data import open_data

        return open_data(with_tokenizer(self.config), seed=self.config.seed)

    def model(self, data: Data) -> nn.Module:
        """Loaded, with its head, rewritten."""
        self.built = build(self.config, data)
        return self.built.model

    def objective(self, data: Data, model: nn.Module) -> Objective:
        """What the section ``objective`` names."""
        from surgery.train.objectives import objective

        return objective(self.config, data.facts, model)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """What the section ``optim`` names, over what is trained."""
        from surgery.train.optimizers import build_optimizer

        optim = self.config.optim
        if optim.name != "adamw" or optim.loraplus is None:
            return build_optimizer(model, optim)
        groups = adapters.parameter_groups(
            model, lr=optim.lr, ratio=optim.loraplus, weight_decay=optim.weight_decay
        )
        return build_optimizer(model, optim, groups)

    def kept(self) -> Kept:
        """All tensors that a resume could not take from the source."""
        built = self.built
        partial = built is not None and self.config.checkpoint.weights == "changed"
        return Everything() if built is None or not partial else built.loaded or Everything()

    def notes(self, model: nn.Module) -> list[str]:
        """What is trained, and which of it is new."""
        everything = dict(named_parameters(model))
        trained = [p for p in everything.values() if p.requires_grad]
        count, total = (sum(p.numel() for p in each) for each in (trained, everything.values()))
        share = f"{human_count(count)} of {human_count(total)} parameters ({count / total:.3%})"
        told = [f"trained: {share}"]
        told += () if self.built is None else self.built.warnings
        new = () if self.built is None else self.built.new
        if new:
            told.append(f"new, drawn from seed {self.config.seed}: {', '.join(new)}")
        return told

    def finish(self, model: nn.Module, data: Data, out: Path) -> str | None:
        """Write what was trained, without the rest of the model, and what the classes are called.

        An adapter beside stock weights that are as they were loaded is written as ``surgery.save``
        does, one with a trained head or other trained stock weights as PEFT does.
        """
        if data.facts.names is not None:
            files.write(out / CLASSES, json.dumps(list(data.facts.names), indent=1) + "\n")
        if record_of(model) is None:
            return None
        changed = self._changed(model)
        if not changed:
            save(model, out / ADAPTER, adapter_only=True)
            return None
        beside = f"{len(changed)} stock tensors that were trained or changed, such as {changed[0]}"
        reason = self._for_peft(model, out / ADAPTER)
        if reason is None:
            return f"{ADAPTER}/ is an adapter of PEFT, with {beside}"
        return f"no {ADAPTER}/: it would leave out {beside}; {reason}. {MODEL}/ has everything"

    def _for_peft(self, model: nn.Module, folder: Path) -> str | None:
        """Write an adapter of PEFT with the stock weights that were trained; or why not."""
        loaded = None if self.built is None else self.built.loaded
        moved = [] if loaded is None else loaded.moved_buffers(model)
        if moved:
            return f"{moved[0]} is no parameter, and moved while the model was trained"
        if not installed("peft"):
            return "peft, which would write it, is not installed"
        misfit = why_not_low_rank(model)
        if misfit is not None:
            return misfit
        try:
            with replacing(folder, check=lambda _: None) as work:
                write_peft(model, work)
        except ExportError as error:
            return error.message
        return None

    def _changed(self, model: nn.Module) -> list[str]:
        """Stock tensors that are not as they were loaded, or came with no weights."""
        record, built = record_of(model), self.built
        if record is None or built is None or built.loaded is None:
            return []
        added = {name for edit in record.edits for name in edit.adds}
        stock = {name for name, _ in named_parameters(model)} - added
        changed = [name for name in built.loaded.state(model) if name in stock]
        return changed + built.loaded.moved_buffers(model)
