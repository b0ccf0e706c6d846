"""All that a training step changes, written to a checkpoint and read back.

Alone and under DDP every rank has the whole state: the main rank writes it. Under FSDP2 each rank
has shards, and ``torch.distributed.checkpoint`` writes and reads those, so that another number of
ranks can go on.
"""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from surgery.errors import CheckpointError
from surgery.train import checkpoints, randomness
from surgery.train.engine import Engine, accelerate
from surgery.train.pack import Flat, pack, unpack

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from surgery.train.checkpoints import Progress
    from surgery.train.keeping import Kept
    from surgery.train.objectives.base import Objective
    from surgery.train.optimizers import Schedule
    from surgery.train.watch import Watch


@dataclass(frozen=True)
class Snapshot:
    """The parts of a run that change as it trains.

    Attributes:
        accelerator: The engine.
        model: The plain model, prepared.
        optimizer: The plain optimizer.
        schedule: Of its learning rate.
        aim: The objective.
        watch: Judge of losses.
        kept: Which tensors of the model are written, where it is not sharded.
    """

    accelerator: Engine
    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    aim: Objective
    watch: Watch
    kept: Kept

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of the model."""
        return bool(self.accelerator.is_fsdp2)

    def save(self, folder: Path, step: int, seconds: float, config: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``; every rank calls it.

        Args:
            folder: Of all checkpoints.
            step: Optimizer steps done.
            seconds: Spent in them.
            config: The configuration, as data.

        Raises:
            CheckpointError: the disk is full.
        """
        progress = checkpoints.Progress(
            step, seconds, self.accelerator.num_processes, self.sharded, self._extra()
        )
        weights = self.model.state_dict() if self.sharded else self.kept.state(self.model)
        with self._place(folder, step, weights) as work:
            self._write(work, weights)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                checkpoints.seal(work, progress, config)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path, progress: Progress, seed: int) -> None:
        """Go on from a checkpoint; every rank calls it.

        Args:
            folder: Of the checkpoint.
            progress: What ``read_progress`` gave.
            seed: What random generators are seeded from where there are more ranks now.

        Raises:
            CheckpointError: it is sharded and the run is not, or the other way round.
        """
        if progress.sharded != self.sharded:
            there, here = ("sharded", "whole") if progress.sharded else ("whole", "sharded")
            raise CheckpointError(
                f"{folder} holds a {there} model, and this run has a {here} one",
                hint="resume with as many ranks as before, or at least two for fsdp2",
            )
        extra = progress.extra
        if self.sharded:
            self._load_shards(folder)
        else:
            self._check_origin(folder, extra)
            self._load_whole(folder)
        self.schedule.load_state_dict(unpack(extra["schedule"], {}))
        self.watch.load_state_dict(extra["watch"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(extra["scaler"])
        self._load_randomness(folder, progress, seed)

    @contextmanager
    def _place(self, folder: Path, step: int, weights: Flat) -> Generator[Path]:
        """The folder to write to: the main rank's, on every rank."""
        need = self._bytes(weights)
        main = self.accelerator.is_main_process
        # Asked on every rank, so that all of them stop where the disk is full.
        checkpoints.check_space(folder, step, need)
        with checkpoints.writing(folder, step, need) if main else nullcontext() as work:
            told = [None if work is None else str(work)]
            accelerate("utils").broadcast_object_list(told)
            yield Path(cast("str", told[0]))

    def _extra(self) -> dict[str, Any]:
        schedule, tensors = pack(self.schedule.state_dict(), "schedule")
        if tensors:
            raise CheckpointError("a schedule keeps tensors, which its checkpoint has no place for")
        scaler = self.accelerator.scaler
        return {
            "schedule": schedule,
            "watch": self.watch.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "origin": self.kept.origin,
        }

    def _check_origin(self, folder: Path, extra: Mapping[str, Any]) -> None:
        if extra.get("origin") != self.kept.origin:
            raise CheckpointError(
                f"{folder} goes with other pretrained weights than model.source has now",
                hint="resume with the weights that the run was started from, and with the same "
                "checkpoint.weights",
            )

    def _bytes(self, weights: Flat) -> int:
        """Bytes that a checkpoint takes on the disk, headers aside."""
        _, optimizer = pack(self.optimizer.state_dict()["state"], "")
        _, aim = pack(self.aim.state_dict(), "")
        tensors = [*weights.values(), *optimizer.values(), *aim.values()]
        return checkpoints.tensor_bytes(tensors)

    def _write(self, work: Path, weights: Flat) -> None:
        rank = self.accelerator.process_index
        checkpoints.write_state(work, randomness.state(), f"rank-{rank:05d}")
        if self.sharded:
            self._write_shards(work)
        elif self.accelerator.is_main_process:
            checkpoints.write_tensors(work / "model.safetensors", weights)
            checkpoints.write_state(work, self.optimizer.state_dict(), "optimizer")
            checkpoints.write_state(work, self.aim.state_dict(), "objective")

    def _load_whole(self, folder: Path) -> None:
        weights = checkpoints.read_tensors(folder / "model.safetensors")
        self.kept.load(self.model, weights)
        self.optimizer.load_state_dict(checkpoints.read_state(folder, "optimizer"))
        self.aim.load_state_dict(checkpoints.read_state(folder, "objective"))

    def _load_randomness(self, folder: Path, progress: Progress, seed: int) -> None:
        rank = self.accelerator.process_index
        if self.accelerator.num_processes == progress.ranks:
            randomness.restore(checkpoints.read_state(folder, f"rank-{rank:05d}"))
        else:
            randomness.seed_all(seed + progress.step, rank)

    def _write_shards(self, work: Path) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        distributed: Any = importlib.import_module("torch.distributed.checkpoint")

        shards, structure = self._shards()
        with _quiet():
            writer = HuggingFaceStorageWriter(str(work), save_distributed=True)
            distributed.save(shards, storage_writer=writer)
        if self.accelerator.is_main_process:
            checkpoints.write_json(work / "structure.json", structure)

    def _load_shards(self, folder: Path) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        distributed: Any = importlib.import_module("torch.distributed.checkpoint")
        shards, _ = self._shards()
        checkpoints.check_tensors(folder)
        with _quiet():
            distributed.load(shards, storage_reader=HuggingFaceStorageReader(str(folder)))
        structure = checkpoints.read_json(folder / "structure.json")
        state = {name: unpack(structure[name], shards) for name in structure}
        weights = state["model"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=weights | {n: weights[f] for n, f in _repeated(self.model).items()},
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(flatten_optimizer_state_dict=True),
        )
        self.aim.load_state_dict(state["objective"])

    def _shards(self) -> tuple[Flat, dict[str, Any]]:
        """The tensors of model, optimizer and objective by name, and where each belongs."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        model, optimizer = get_state_dict(
            self.model,
            self.optimizer,
            options=StateDictOptions(flatten_optimizer_state_dict=True),
        )
        # A tensor with several names is written once: shared memory has no place in safetensors.
        model = {
            name: tensor for name, tensor in model.items() if name not in _repeated(self.model)
        }
        state = {"model": model, "optimizer": optimizer, "objective": self.aim.state_dict()}
        shards: dict[str, Tensor] = {}
        structure: dict[str, Any] = {}
        for name, part in state.items():
            structure[name], tensors = pack(part, name)
            shards |= tensors
        return shards, structure


def _repeated(model: nn.Module) -> dict[str, str]:
    """Further names of parameters and buffers that have several, with their first one."""
    first: dict[int, str] = {}
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    found = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    return {name: other for name, other in found.items() if name != other}


@contextmanager
def _quiet() -> Generator[None]:
    with warnings.catch_warnings():
        # torch's own checkpointing calls parts of torch that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
