"""``pretrain``: a configuration becomes a run folder with a trained model in it.

What pretraining and fine-tuning do alike is ``run_job``; what each does its own way is a ``Job``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from torch import Tensor, nn

from surgery import adapters, files, progress
from surgery.checkpoints import save
from surgery.errors import TrainingError
from surgery.optim.sharpness import Ascent
from surgery.passes.lowrank import LowRank
from surgery.passes.streams import shortcuts
from surgery.record import record_of
from surgery.train import checkpoints, randomness
from surgery.train.assembly import build_model, check_shardable, wrapped_classes
from surgery.train.data.facts import write_facts
from surgery.train.engine import Engine, engine, gather_by
from surgery.train.keeping import Everything, Kept
from surgery.train.logs import LOG, RunLog, lines
from surgery.train.loop import Clock, Loop, Tell
from surgery.train.optimizers import build_optimizer, build_schedule
from surgery.train.snapshot import Snapshot
from surgery.train.watch import Watch, by_itself

if TYPE_CHECKING:
    from rich.table import Table
    from torch.optim import Optimizer

    from surgery.train.config import PretrainConfig, RunConfig
    from surgery.train.data.base import Data
    from surgery.train.objectives.base import Objective

C = TypeVar("C", bound="RunConfig")

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
MODEL = "model"
AVERAGED = "model-ema"


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        out: Its folder.
        steps: Optimizer steps done.
        seconds: Spent in them.
        evaluation: What the last evaluation gave; empty where there was none.
    """

    out: Path
    steps: int
    seconds: float
    evaluation: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        averaged = None if self.averaged is None else str(self.averaged)
        return {
            "out": str(self.out),
            "steps": self.steps,
            "seconds": self.seconds,
            "evaluation": self.evaluation,
            "model": str(self.model),
            "averaged": averaged,
        }

    def view(self) -> Table:
        """As a table for a rich console."""
        from rich.table import Table

        table = Table("what", "value")
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                for measure, number in cast("dict[str, float]", value).items():
                    table.add_row(f"held out: {measure}", f"{number:.6g}")
            elif value is not None:
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        return table

    @property
    def model(self) -> Path:
        """The trained model, for ``surgery.restore``."""
        return self.out / MODEL

    @property
    def averaged(self) -> Path | None:
        """The model with averaged weights; None where the objective keeps none."""
        folder = self.out / AVERAGED
        return folder if folder.is_dir() else None


def pretrain(
    config: PretrainConfig,
    *,
    out: Path,
    resume: bool = False,
    tell: Tell | None = None,
) -> Run:
    """Train a model from random weights.

    Works alone, under ``accelerate launch`` and under ``torchrun``.

    Args:
        config: What is trained, on what, and how.
        out: Folder of the run; created.
        resume: Go on from the last checkpoint in ``out``, or start where there is none.
        tell: On the main rank, told a line for people now and then, and its kind: ``step``,
            ``evaluation`` or ``event``.

    Returns:
        Where the result is, and what the last evaluation gave.

    Raises:
        ConfigError: the configuration does not go with the ranks, the device or the launcher.
        DataError: the data is missing or broken.
        ModelStateError: the model does not fit the data.
        CheckpointError: there is a run in ``out`` already, its checkpoint is of another
            configuration, or the disk is full.
        TrainingError: the loss or a gradient is not finite, and the configuration says to stop; or
            another rank is gone.
    """
    return run_job(Pretraining(config), out=out, resume=resume, tell=tell)


class Job(ABC, Generic[C]):
    """What one kind of run does its own way; every rank calls all of it.

    Attributes:
        config: The configuration.
    """

    config: C
    _penalised: bool = False

    @abstractmethod
    def data(self) -> Data:
        """What is trained and evaluated on."""

    @abstractmethod
    def model(self, data: Data) -> nn.Module:
        """The model, rewritten, on the CPU and in train mode; the same on every rank."""

    @abstractmethod
    def objective(self, data: Data, model: nn.Module) -> Objective:
        """What is minimised, tried on the plain model."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of what is trained, before the model is wrapped."""

    def prepared(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Attach what the methods of adapters do around the optimizer's step.

        Args:
            model: The plain model, once it is moved, wrapped and sharded.
            optimizer: The plain optimizer.
        """
        record = record_of(model)
        if record is not None and any(edit.pass_name == LowRank.name for edit in record.edits):
            adapters.prepare(model, optimizer)
            self._penalised = adapters.penalty(model).requires_grad

    def penalty(self, model: nn.Module) -> Tensor | None:
        """What the methods of adapters add to the loss (SORSA); None for nothing."""
        return adapters.penalty(model) if self._penalised else None

    def kept(self) -> Kept:
        """Which tensors of the model a checkpoint holds; asked once there is a model."""
        return Everything()

    def notes(self, model: nn.Module) -> Sequence[str]:
        """What there is to know about the model before it is trained, in sentences."""
        return ()

    def finish(self, model: nn.Module, data: Data, out: Path) -> str | None:
        """Write what belongs beside the trained model; on the main rank, with a whole model.

        Returns:
            What there is to know about it, in a sentence, or None.
        """
        return None


@dataclass
class Pretraining(Job["PretrainConfig"]):
    """A model from random weights.

    Attributes:
        config: The configuration.
        warnings: What the plan of its rules says, once the model was built.
    """

    config: PretrainConfig
    warnings: tuple[str, ...] = ()

    def data(self) -> Data:
        """What the section ``data`` names."""
        from surgery.train.data import open_data

        return open_data(self.config.data, seed=self.config.seed)

    def model(self, data: Data) -> nn.Module:
        """From the seed of the configuration."""
        model, self.warnings = build_model(self.config)
        return model

    def objective(self, data: Data, model: nn.Module) -> Objective:
        """What the section ``objective`` names."""
        from surgery.train.objectives import objective

        return objective(self.config, data.facts, model)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """What the section ``optim`` names."""
        return build_optimizer(model, self.config.optim)

    def notes(self, model: nn.Module) -> Sequence[str]:
        """What the plan of the rules says people should think about."""
        return self.warnings


def run_job(job: Job[Any], *, out: Path, resume: bool = False, tell: Tell | None = None) -> Run:
    """Train: alone, under ``accelerate launch`` or under ``torchrun``.

    Args:
        job: What is done.
        out: As for ``pretrain``.
        resume: As for ``pretrain``.
        tell: As for ``pretrain``.

    Raises:
        SurgeryError: as for ``pretrain``.
    """
    config = job.config
    start = _start(config, out, resume=resume)
    with ExitStack() as stack:
        accelerator = stack.enter_context(engine(config))
        with accelerator.main_process_first(), progress.task("opening the data"):
            data = job.data()
        loop = assembled(job, accelerator, data, out=out, tell=tell)
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            files.write(out / CONFIG, config.to_yaml())
            write_facts(data.facts, out)
        accelerator.wait_for_everyone()
        done = 0 if start is None else _go_on(loop, start)
        if accelerator.is_main_process:
            loop.log = stack.enter_context(
                RunLog(out, tensorboard=config.log.tensorboard, step=done)
            )
        loop.run(done)
        _save_result(job, loop)
        return Run(out, config.train.steps, loop.clock.seconds, _last_evaluation(loop))


def _start(config: RunConfig, out: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; None for a run from the start."""
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file, expected a folder for the run")
    if resume:
        found = checkpoints.latest(out / CHECKPOINTS)
        if found is not None:
            _, saved = checkpoints.read_progress(found)
            checkpoints.check_same(found, saved, config.dump())
        return found
    if (out / LOG).exists() or (out / CHECKPOINTS).exists():
        raise TrainingError(
            f"{out} holds a run already",
            hint="go on with resume (--resume), or name another folder (--out)",
        )
    return None


def assembled(
    job: Job[Any],
    accelerator: Engine,
    data: Data,
    *,
    out: Path,
    tell: Tell | None = None,
) -> Loop:
    """The loop of a run from the start, without a log.

    Args:
        job: What is done.
        accelerator: Of the run.
        data: What ``job.data`` gave.
        out: Folder of the run.
        tell: As for ``pretrain``.
    """
    config = job.config
    model = job.model(data)
    if accelerator.is_fsdp2:
        check_shardable(model)
        gather_by(accelerator, wrapped_classes(model))
    model.to(accelerator.device)
    aim = job.objective(data, model)
    optimizer = job.optimizer(model)
    schedule = build_schedule(optimizer, config.schedule, config.train.steps)
    initial = shortcuts(model)
    prepared, stepper = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(prepared, keep_torch_compile=False)
    # Before the rules of adapters, which act within what it sees of a step.
    uphill = config.train.sharpness
    ascent = uphill and Ascent(stepper.optimizer, rho=uphill.rho, theta=uphill.theta)
    job.prepared(plain, stepper.optimizer)
    aim.start(plain)
    scaled = accelerator.scaler is not None
    watch = Watch(config.train, by_itself(optimizer, accelerator.device, scaled=scaled))
    randomness.seed_all(config.seed, accelerator.process_index)
    snapshot = Snapshot(accelerator, plain, stepper.optimizer, schedule, aim, watch, job.kept())
    return Loop(
        config=config,
        out=out,
        accelerator=accelerator,
        model=prepared,
        plain=plain,
        # Accelerate's own step looks for packages on the disk each time; it is needed for scaling.
        optimizer=stepper if scaled else stepper.optimizer,
        schedule=schedule,
        aim=aim,
        penalty=job.penalty,
        data=replace(data, notes=(*data.notes, *job.notes(plain))),
        snapshot=snapshot,
        watch=watch,
        ascent=ascent,
        log=None,
        initial=initial,
        tell=tell,
    )


def _go_on(loop: Loop, start: Path) -> int:
    """Put everything into the state of a checkpoint; the steps it had done."""
    saved, _ = checkpoints.read_progress(start)
    loop.snapshot.load(start, saved, loop.config.seed)
    loop.clock = Clock(saved.seconds)
    return saved.step


def _last_evaluation(loop: Loop) -> dict[str, float]:
    """What the last evaluation gave, also where an earlier part of the run made it."""
    if loop.evaluation:
        return loop.evaluation
    found = [line for line in lines(loop.out) if line["kind"] == "evaluation"]
    return {k: v for k, v in found[-1].items() if k not in ("kind", "step")} if found else {}


def _save_result(job: Job[Any], loop: Loop) -> None:
    """Write the trained model, and the averaged one where there is an average."""
    objective, out = loop.config.objective, loop.out
    _save_model(job, loop, lambda model: _saved(job, loop, model))
    if objective.kind == "diffusion" and objective.ema is not None:
        with loop.aim.averaged():
            _save_model(job, loop, lambda model: save(model, out / AVERAGED))


def _saved(job: Job[Any], loop: Loop, model: nn.Module) -> None:
    save(model, loop.out / MODEL)
    said = job.finish(model, loop.data, loop.out)
    if said is not None:
        loop.note(said)


def _save_model(job: Job[Any], loop: Loop, write: Callable[[nn.Module], object]) -> None:
    accelerator = loop.accelerator
    model = _whole(job, loop) if loop.snapshot.sharded else loop.plain
    if accelerator.is_main_process:
        with _bare(model):
            write(model)
    accelerator.wait_for_everyone()


def _whole(job: Job[Any], loop: Loop) -> nn.Module:
    """A sharded model gathered on the main rank, as the class it was built as."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(loop.plain, options=options)
    if not loop.accelerator.is_main_process:
        return loop.plain
    model = job.model(loop.data)
    model.load_state_dict(weights)
    return model


@contextmanager
def _bare(model: nn.Module) -> Generator[None]:
    """Without the forward that accelerate hangs on the object for autocast."""
    own = vars(model)
    hung = {name: own.pop(name) for name in ("forward", "_original_forward") if name in own}
    try:
        yield
    finally:
        own.update(hung)
