"""``adapt``: a configuration becomes a run folder with a meta-trained model in it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from surgery import mirrors
from surgery.checkpoints import restore
from surgery.errors import CheckpointError, ConfigError
from surgery.table import human_count
from surgery.train.adapt.config import AdaptConfig
from surgery.train.adapt.learner import Learner
from surgery.train.adapt.objective import MetaObjective, example_of, load_extra
from surgery.train.checkpoints import read_tensors, write_tensors
from surgery.train.engine import ranks
from surgery.train.finetune.assembly import Built, build
from surgery.train.finetune.source import tokenized
from surgery.train.run import CONFIG, MODEL, Job, Run, run_job

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from surgery.train.data.base import Data
    from surgery.train.loop import Tell
    from surgery.train.objectives.base import Objective

EXTRA = "inner.safetensors"


def adapt(
    config: AdaptConfig,
    *,
    out: Path,
    resume: bool = False,
    tell: Tell | None = None,
) -> Run:
    """Meta-train a model, so that a few gradient steps adapt it to a new task.

    Runs in one process. Beside what every run leaves, the folder gets ``inner.safetensors`` where
    step sizes or the variances of a prior are learned.

    Args:
        config: What is trained, on what tasks, and how.
        out: Folder of the run; created.
        resume: Go on from the last checkpoint in ``out``, or start where there is none.
        tell: Told a line for people now and then, and its kind: ``step``, ``evaluation`` or
            ``event``.

    Returns:
        Where the result is, and what the last evaluation gave.

    Raises:
        ConfigError: the configuration does not go with the ranks, the device, or itself.
        SourceError: the model cannot be had.
        RuleError: the rules do not fit it.
        DataError: the data is missing or broken, or cannot fill tasks of this size.
        ModelStateError: the model does not fit the tasks, is no function of its parameters, or has
            parameters that get no gradient.
        CheckpointError: there is a run in ``out`` already, its checkpoint is of another
            configuration, or the disk is full.
        TrainingError: an inner loop diverges.
    """
    if ranks() > 1:
        raise ConfigError(
            f"tasks are adapted to in one process, and the launcher started {ranks()}",
            hint="run surgery adapt without a launcher",
        )
    return run_job(Adapting(config), out=out, resume=resume, tell=tell)


def learner(run: Path) -> Learner:
    """The meta-trained model of a run's folder, ready to adapt to tasks.

    Args:
        run: What ``adapt`` was given as ``out``.

    Raises:
        ConfigError, CheckpointError, DataError: the folder is not one of a finished run, or its
            data is gone.
    """
    if not (run / MODEL).is_dir():
        raise CheckpointError(
            f"{run} has no folder {MODEL}: no run has ended there",
            hint="name the folder of a finished run of surgery adapt",
        )
    config = AdaptConfig.load(run / CONFIG)
    job = Adapting(config)
    data = job.data()
    found = build(config, data).model
    found.load_state_dict(restore(run / MODEL).state_dict())
    made = Learner(config, data.facts, found, example_of(data))
    file = run / EXTRA
    load_extra(made, read_tensors(file) if file.exists() else {})
    return made


def _idle_maps(model: nn.Module, adapted: Collection[str]) -> list[str]:
    """That a map is over parameters which the inner loop does not move: it is of no use to them."""
    idle = [each for each in mirrors.attached(model) if not set(each.parameters) & set(adapted)]
    if not idle:
        return []
    said = (
        f"{len(idle)} mirror maps are over parameters that do not adapt, such as "
        f"{idle[0].parameters[0]}: let those require gradients and inner.where select them, or "
        "leave the maps out"
    )
    return [said]


@dataclass
class Adapting(Job["AdaptConfig"]):
    """A model that is trained to adapt.

    Attributes:
        config: The configuration.
        built: Its model, once it was built.
    """

    config: AdaptConfig
    built: Built | None = None
    _aim: MetaObjective | None = field(default=None, init=False)

    def data(self) -> Data:
        """The tasks of the section ``data``, texts with the tokenizer of the model."""
        from surgery.train.adapt.tasks import open_tasks

        config = self.config.data
        if config.kind == "episodes":
            source = tokenized(config.source, self.config.model.source)
            config = config.model_copy(update={"source": source})
        return open_tasks(config, seed=self.config.seed)

    def model(self, data: Data) -> nn.Module:
        """Loaded, with its head, rewritten."""
        self.built = build(self.config, data)
        return self.built.model

    def objective(self, data: Data, model: nn.Module) -> Objective:
        """The query loss after the inner loop."""
        made = Learner(self.config, data.facts, model, example_of(data))
        self._aim = MetaObjective(made)
        return self._aim

    def optimizer(self, model: nn.Module) -> Optimizer:
        """What the section ``optim`` names, over all that is meta-learned."""
        from surgery.passes.streams import parameter_groups
        from surgery.train.optimizers import build_optimizer

        optim = self.config.optim
        groups = parameter_groups(model, weight_decay=optim.weight_decay)
        extra = [] if self._aim is None else self._aim.parameters()
        if extra:
            groups.append({"params": extra, "weight_decay": 0.0})
        return build_optimizer(model, optim, groups)

    def notes(self, model: nn.Module) -> list[str]:
        """What adapts, and what is meta-learned beside it."""
        assert self._aim is not None  # noqa: S101 - the objective is built first
        meta = self._aim.learner.meta()
        adapted, others, extra = (sum(t.numel() for t in part.values()) for part in meta)
        told = f"{human_count(adapted)} parameters adapt"
        if others:
            told += f", {human_count(others)} are the same for all tasks"
        if extra:
            told += f", {human_count(extra)} are learned beside the model"
        warnings = () if self.built is None else self.built.warnings
        return [told, *_idle_maps(model, meta.start), *warnings]

    def finish(self, model: nn.Module, data: Data, out: Path) -> str | None:
        """Write what is meta-learned beside the model."""
        assert self._aim is not None  # noqa: S101 - as above
        state = self._aim.state_dict()
        if state:
            (out / EXTRA).unlink(missing_ok=True)
            write_tensors(out / EXTRA, state)
        return None
