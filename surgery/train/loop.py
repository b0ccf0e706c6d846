"""The training loop: batches in, weights, log lines and checkpoints out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from surgery import progress
from surgery.passes.streams import shortcuts
from surgery.train import randomness
from surgery.train.engine import Engine, accelerate
from surgery.train.statistics import unrecorded
from surgery.train.watch import Blame, Watch, failure

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from surgery.optim.sharpness import Ascent
    from surgery.train.config import RunConfig
    from surgery.train.data.base import Batch, Data
    from surgery.train.logs import RunLog
    from surgery.train.objectives.base import Objective
    from surgery.train.optimizers import Schedule
    from surgery.train.snapshot import Snapshot
    from surgery.train.watch import Verdict

Said = Literal["step", "evaluation", "event"]
Tell = Callable[[Said, str], None]


@dataclass
class Clock:
    """Time spent in training steps: evaluation, sampling and checkpoints stand aside.

    Attributes:
        seconds: Over all parts of the run, up to the last stop.
    """

    seconds: float = 0.0
    _since: float | None = None

    def start(self) -> None:
        """Run."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stand still."""
        self.seconds = self.now
        self._since = None

    @property
    def now(self) -> float:
        """Seconds so far."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextmanager
    def aside(self) -> Generator[None]:
        """Stand still inside."""
        self.stop()
        yield
        self.start()


@dataclass
class Loop:
    """Everything a step needs.

    Attributes:
        config: The configuration.
        out: The run's folder.
        accelerator: The engine.
        model: The prepared model.
        plain: The same without wrappers.
        optimizer: The optimizer, prepared where losses are scaled.
        schedule: Of its learning rate.
        aim: The objective.
        penalty: A term of the loss that a rewrite of the plain model asks for, if any.
        data: What is trained and evaluated on.
        snapshot: Saves and loads all of it.
        watch: Judges every step.
        ascent: Where the gradient is taken, if not at the weights.
        log: On the main rank.
        initial: Coefficients that training starts from, taken before the model was sharded.
        tell: Told a line for people, and of what kind it is; None says nothing.
        clock: Time spent in steps.
        evaluation: What the last evaluation gave.
    """

    config: RunConfig
    out: Path
    accelerator: Engine
    model: nn.Module
    plain: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    aim: Objective
    penalty: Callable[[nn.Module], Tensor | None]
    data: Data
    snapshot: Snapshot
    watch: Watch
    ascent: Ascent | None
    log: RunLog | None
    initial: dict[str, Tensor]
    tell: Tell | None = None
    clock: Clock = field(default_factory=Clock)
    evaluation: dict[str, float] = field(default_factory=dict[str, float])

    def run(self, done: int) -> None:
        """Train from step ``done`` + 1 to the last.

        Raises:
            TrainingError: a step is not finite or a spike, and the configuration says to stop.
            CheckpointError: the disk is full.
        """
        steps = self.config.train.steps
        with progress.task("training", total=steps) as task:
            task.advance(done)
            self.start(done)
            for step in range(done + 1, steps + 1):
                task.note = self.advance(step) or task.note
                task.advance()
            self.clock.stop()

    def start(self, done: int) -> None:
        """Get ready for step ``done`` + 1."""
        everything = (*self.plain.parameters(), *self.aim.parameters())
        self._parameters = [p for p in everything if p.requires_grad]
        self._logged = (done, self.clock.seconds)
        self._batches = self._training_batches(done)
        if done:
            self._say("event", f"going on from step {done}")
        else:
            self._tell_notes()
            if self.config.log.matrices is not None:
                self._write_matrices(0, self.initial)
        self.clock.start()

    def _tell_notes(self) -> None:
        """What there is to know about data and model before training."""
        for note in self.data.notes:
            self._write("event", 0, {"event": "start", "reason": note})
            self._say("event", note)

    def note(self, sentence: str) -> None:
        """Say and write down something about the result."""
        self._write("event", self.config.train.steps, {"event": "result", "reason": sentence})
        self._say("event", sentence)

    def advance(self, step: int) -> str | None:
        """Make a step, and whatever is due after it; the line of the log in words, if any."""
        loss, norm = self._step(step)
        said: str | None = None
        if self._due(step, self.config.log.every):
            self._settle()
            said = self._log_step(step, loss, norm)
        self._sometimes(step)
        return said

    def _sometimes(self, step: int) -> None:
        """What does not happen at every step."""
        config, sampling = self.config, self.aim.sample_every
        if config.log.matrices is not None and self._due(step, config.log.matrices):
            with self.clock.aside():
                self._log_matrices(step)
        if self._due(step, config.evaluate.every):
            self._settle()
            with self.clock.aside():
                self._evaluate(step)
        if sampling is not None and step % sampling == 0:
            with self.clock.aside():
                self._sample(step)
        if self._due(step, config.checkpoint.every):
            self._settle()
            with self.clock.aside():
                self._save(step)

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.train.steps

    def _step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; the loss over this rank's samples, and the norm of the gradient."""
        if self.ascent is None:
            loss = self._gradients(self._parts(), step)
        else:
            loss = self._gradients_uphill(self.ascent, step)
        norm = self._gradient_norm()
        if self._judge(step, loss, norm):
            self.optimizer.step()
            self.aim.stepped()
            self.schedule.step()
        else:
            self._pass_over()
        self.optimizer.zero_grad()
        return loss, norm

    def _gradients(self, parts: Iterable[tuple[Batch, Tensor | None]], step: int) -> Tensor:
        """Forward and backward passes over the parts of a batch; the mean loss."""
        total: Tensor | None = None
        for batch, weight in parts:
            with self.accelerator.accumulate(self.model):
                loss = self._loss(batch, step, weight)
                self.accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None  # noqa: S101 - accumulate is at least 1
        return total / self.config.train.accumulate

    def _gradients_uphill(self, ascent: Ascent, step: int) -> Tensor:
        """The gradient at the top of an ascent from the weights; the loss at the weights.

        Both passes see the same samples under the same dropout, and batch norms record the first.
        """
        parts = list(self._parts())
        drawn = randomness.state()
        loss = self._gradients(parts, step)
        with ascent.climbed(), unrecorded(self.plain):
            randomness.restore(drawn)
            self._gradients(parts, step)
        return loss

    def _loss(self, batch: Batch, step: int, weight: Tensor | None) -> Tensor:
        """The loss of a part of the batch, so that the mean over all parts is the batch's."""
        loss = self.aim.loss(self.model, batch, step=step)
        if weight is not None:
            loss = loss * weight
        penalty = self.penalty(self.plain)
        return loss if penalty is None else loss + penalty

    def _parts(self) -> Iterator[tuple[Batch, Tensor | None]]:
        """This rank's parts of the next batch, and how much more than the mean part each counts.

        A mean over tokens is not the mean of the parts' means where parts have different numbers
        of tokens. None where all parts count the same, as the only one does.
        """
        accumulate, ranks = self.config.train.accumulate, self.accelerator.num_processes
        if not self.aim.weighed or accumulate * ranks == 1:
            for _ in range(accumulate):
                yield next(self._batches), None
            return
        batches = [next(self._batches) for _ in range(accumulate)]
        weights = torch.stack([self.aim.weight(batch) for batch in batches]).double()
        total = weights.sum()
        if ranks > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        share = weights * (accumulate * ranks / total.clamp(min=1))
        yield from zip(batches, share.float(), strict=True)

    def _pass_over(self) -> None:
        """Go on in the schedule without a step of the optimizer."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.schedule.step()

    def _gradient_norm(self) -> Tensor:
        from torch.distributed.tensor import DTensor

        clip = self.config.train.clip
        if clip is not None:
            norm = self.accelerator.clip_grad_norm_(self._parameters, clip)
        else:
            if self.accelerator.scaler is not None:
                self.accelerator.unscale_gradients()
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _judge(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Whether the optimizer may make this step."""
        if self.watch.defers:
            self.watch.defer(step, loss, norm)
            return True
        alone = self.accelerator.num_processes == 1
        known = alone or self.watch.follows_loss
        value = float(self._over_ranks(loss)) if known else None
        verdict = self.watch.judge(value, float(norm))
        if verdict == "fine":
            self.watch.stops(verdict)
            return True
        self._trouble(step, verdict, float(self._over_ranks(loss)), float(norm))
        return False

    def _settle(self) -> None:
        """Learn of the steps that the optimizer left out by itself."""
        for step, loss, norm in self.watch.settled():
            self._trouble(step, "not finite", loss, norm)

    def _trouble(self, step: int, verdict: Verdict, loss: float, norm: float) -> None:
        """Stop the run, or write down that the step is skipped."""
        seen = self.watch.describe(verdict, loss, norm)
        culprit = self._culprit(step) if verdict == "not finite" else "all values are finite"
        error = failure(step, seen, self._positions(step), culprit)
        event = {"reason": error.message}
        if self.watch.stops(verdict):
            self._write("event", step, {"event": "stopped", **event})
            raise error
        self._write("event", step, {"event": "skipped", **event})
        self._say("event", f"skipped: {error.message}")

    def _culprit(self, step: int) -> str:
        """Run the batch again, looking at every module; the first in trouble on any rank."""
        self.optimizer.zero_grad()
        blame = Blame(self.plain)
        again = self._training_batches(step - 1)
        with blame.watching():
            for _ in range(self.config.train.accumulate):
                loss = self.aim.loss(self.plain, next(again), step=step)
                cast("Any", loss).backward()
        found: list[str] = [
            each for each in accelerate("utils").gather_object([blame.found]) if each is not None
        ]
        return found[0] if found else "run again, every module's output and gradient is finite"

    def _positions(self, step: int) -> tuple[int, int]:
        batch = self.config.train.batch
        return (step - 1) * batch, step * batch - 1

    def _training_batches(self, done: int) -> Iterator[Batch]:
        """This rank's batches from step ``done`` + 1 on, on its device."""
        from surgery.train.data import training_loader

        train = self.config.train
        loader = training_loader(
            self.data.train,
            batch=train.batch // train.accumulate,
            seed=self.config.seed,
            start=done * train.accumulate,
            workers=train.workers,
            pin=self.accelerator.device.type == "cuda",
        )
        return iter(self._prepared(loader))

    def _prepared(self, loader: DataLoader[Batch]) -> Any:
        return self.accelerator.prepare_data_loader(loader)

    def _log_step(self, step: int, loss: Tensor, norm: Tensor) -> str:
        """Write the line of a step; return it in words."""
        value = float(self._over_ranks(loss))
        size = self.data.facts.length or 1
        tokens = step * self.config.train.batch * size
        seconds = self.clock.now
        before, then = self._logged
        rate = (step - before) * self.config.train.batch * size / max(seconds - then, 1e-9)
        self._logged = (step, seconds)
        line = {
            "loss": value,
            "lr": float(self.schedule.get_last_lr()[0]),
            "grad_norm": float(norm),
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "per_second": round(rate, 2),
        }
        self._write("step", step, line)
        unit = "tokens" if self.data.facts.length else "samples"
        left = _duration((self.config.train.steps - step) * seconds / step)
        said = f"loss {value:.5g}, {rate:,.0f} {unit}/s, {left} left"
        self._say("step", f"step {step}/{self.config.train.steps}: {said}")
        return said

    def _log_matrices(self, step: int) -> None:
        # Every rank asks: a sharded model gathers its coefficients for it.
        self._write_matrices(step, shortcuts(self.plain))

    def _write_matrices(self, step: int, found: dict[str, Tensor]) -> None:
        if found and self.log is not None:
            self.log.matrices(step, found)

    def _evaluate(self, step: int) -> None:
        from surgery.train.data import evaluation_loader

        section, train = self.config.evaluate, self.config.train
        ranks = self.accelerator.num_processes
        loader = evaluation_loader(
            self.data.held_out,
            batch=(section.batch or train.batch // (ranks * train.accumulate)) * ranks,
            count=section.samples,
            pin=self.accelerator.device.type == "cuda",
        )
        with progress.task("evaluating"):
            self.evaluation = self.aim.evaluate(
                self.model, self._prepared(loader), gather=self.accelerator.gather_for_metrics
            )
        self._write("evaluation", step, self.evaluation)
        told = ", ".join(f"{name} {value:.5g}" for name, value in self.evaluation.items())
        self._say("evaluation", f"step {step}: held out: {told}")

    def _sample(self, step: int) -> None:
        folder = self.out / "samples" if self.accelerator.is_main_process else None
        if folder is not None:
            folder.mkdir(exist_ok=True)
        with progress.task("sampling"), self.aim.averaged():
            self.aim.sample(self.plain, folder, step)

    def _save(self, step: int) -> None:
        from surgery.train import checkpoints

        folder = self.out / "checkpoints"
        with progress.task("saving a checkpoint"):
            self.snapshot.save(folder, step, self.clock.seconds, self.config.dump())
        if self.accelerator.is_main_process:
            checkpoints.prune(folder, self.config.checkpoint.keep)

    def _over_ranks(self, loss: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return loss
        return self.accelerator.reduce(loss, reduction="mean")

    def _write(self, kind: Any, step: int, values: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(kind, step, values)

    def _say(self, kind: Said, text: str) -> None:
        if self.tell is not None and self.accelerator.is_main_process:
            self.tell(kind, text)


def _duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
