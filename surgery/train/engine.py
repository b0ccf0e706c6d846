"""Accelerate, set up as a configuration says and never as the environment happens to be.

Works alone, under ``accelerate launch`` and under ``torchrun``: what these decide is how many
processes there are. Precision, accumulation, compilation and sharding come from the configuration.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from surgery.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from surgery.train.config import RunConfig, TrainConfig

T = TypeVar("T")

_USE_FSDP = "ACCELERATE_USE_FSDP"
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Engine(Protocol):
    """The part of ``accelerate.Accelerator`` that is used here; it comes without types."""

    device: torch.device
    num_processes: int
    process_index: int
    is_main_process: bool
    is_fsdp2: bool
    scaler: Any
    state: Any

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
        """Wrap both for several processes, precision and compilation."""
        ...

    def prepare_data_loader(self, loader: DataLoader[T]) -> DataLoader[T]:
        """This rank's part of every batch, on its device."""
        ...

    def unwrap_model(self, model: nn.Module, *, keep_torch_compile: bool) -> nn.Module:
        """The plain model."""
        ...

    def accumulate(self, model: nn.Module) -> AbstractContextManager[None]:
        """One forward and backward pass; gradients are reduced after the last one of a step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a part of the batch."""
        ...

    def unscale_gradients(self) -> None:
        """Undo the loss scaling of fp16."""
        ...

    def clip_grad_norm_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Clip the gradient; its norm before."""
        ...

    def gather_for_metrics(self, input_data: Tensor) -> Tensor:
        """Values of all ranks without those of repeated samples."""
        ...

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """Sum or mean over ranks."""
        ...

    def main_process_first(self) -> AbstractContextManager[None]:
        """The main rank goes first."""
        ...

    def wait_for_everyone(self) -> None:
        """Wait for all ranks."""
        ...


@contextmanager
def engine(config: RunConfig) -> Generator[Engine]:
    """An accelerator for one run; what it changed globally is put back.

    Args:
        config: The configuration.

    Raises:
        TrainingError: another rank died, or did not join a collective within ``train.timeout``.
        ConfigError: the batch cannot be split over the ranks, or the device or the launcher does
            not go with the configuration.
    """
    launched = os.environ.get(_USE_FSDP)
    _check_launcher(config.train, launched)
    # Before the ranks meet: one that left would be missed by the others.
    _check_ranks(config.train)
    try:
        yield _accelerator(config.train)
    except RuntimeError as error:
        lost = _lost_rank(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        _forget(launched)


def accelerate(module: str = "") -> Any:
    """Accelerate, or one of its modules.

    Raises:
        TrainingError: it is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise TrainingError(
            "training needs accelerate, which is not installed",
            hint="pip install 'model-surgery[train]'",
        )
    return importlib.import_module(f"accelerate.{module}" if module else "accelerate")


def leave() -> None:
    """End the process group, if there is one: the last thing that a launched process does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def ranks() -> int:
    """Processes that the launcher started; 1 where there is no launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gather_by(accelerator: Engine, classes: Sequence[str]) -> None:
    """Say which modules FSDP2 gathers one at a time, by the names of their classes.

    Before the model is prepared; without FSDP2 it means nothing.
    """
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(classes)


def _accelerator(train: TrainConfig) -> Engine:
    library, utils = accelerate(), accelerate("utils")
    sharded = train.parallel == "fsdp2" and ranks() > 1
    plugin = _sharding() if sharded else None
    accelerator = library.Accelerator(
        cpu=_on_cpu(train),
        mixed_precision=_PRECISION[train.precision],
        # One batch is split over the ranks: what is seen does not depend on how many there are.
        dataloader_config=library.DataLoaderConfiguration(
            split_batches=True, dispatch_batches=False, even_batches=True, non_blocking=True
        ),
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(
            num_steps=train.accumulate, adjust_scheduler=False, sync_with_dataloader=False
        ),
        dynamo_plugin=utils.TorchDynamoPlugin(backend="inductor" if train.compile else "no"),
        fsdp_plugin=plugin,
        kwargs_handlers=[
            utils.InitProcessGroupKwargs(timeout=timedelta(seconds=train.timeout)),
            # Gradients exist before the backward, so that what shortcuts hold on to in it does not
            # come on top of them (docs/scaling.md), and are not copied into buckets.
            utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        step_scheduler_with_optimizer=False,
    )
    if plugin is not None:
        _shard_on_cpu_too(accelerator, plugin)
    return accelerator


def _sharding() -> Any:
    return accelerate("utils").FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )


def _shard_on_cpu_too(accelerator: Any, plugin: Any) -> None:
    """Shard over gloo as over NCCL: torch can, accelerate leaves it out for CPU processes."""
    kinds, state = accelerate("utils").DistributedType, accelerator.state
    if state.distributed_type == kinds.MULTI_CPU:
        state.distributed_type = kinds.FSDP
        state.fsdp_plugin = plugin
        # Each new handle on the state copies this one.
        accelerate("state").PartialState._shared_state["distributed_type"] = kinds.FSDP


def _on_cpu(train: TrainConfig) -> bool:
    return train.device == "cpu" or not torch.accelerator.is_available()


def _check_launcher(train: TrainConfig, launched: str | None) -> None:
    if (launched or "").lower() == "true" and train.parallel != "fsdp2":
        raise ConfigError(
            f"the launcher asks for FSDP, and train.parallel is {train.parallel}",
            hint="set train.parallel=fsdp2, or launch without FSDP",
        )
    if train.precision == "fp16" and _on_cpu(train):
        raise ConfigError(
            "precision fp16 needs an accelerator, and the run is on the CPU",
            hint="use train.precision=bf16 or fp32",
        )


def _check_ranks(train: TrainConfig) -> None:
    parts = ranks() * train.accumulate
    if train.batch % parts:
        raise ConfigError(
            f"a batch of {train.batch} cannot be split over {ranks()} ranks and "
            f"{train.accumulate} accumulation steps",
            hint=f"set train.batch to a multiple of {parts}",
        )


def _forget(launched: str | None) -> None:
    """Accelerate keeps its state in class attributes and the environment; the next run has its own.

    The process group stays: it is the launcher's, and a process has one.
    """
    states = accelerate("state")
    states.AcceleratorState._reset_state(reset_partial_state=True)
    states.GradientState._reset_state()
    if launched is None:
        os.environ.pop(_USE_FSDP, None)
    else:
        os.environ[_USE_FSDP] = launched


def main_process() -> bool:
    """Whether this is the process that speaks; known before there is an accelerator."""
    return int(os.environ.get("RANK", "0")) == 0


def _lost_rank(error: RuntimeError) -> TrainingError | None:
    """The error to raise where a collective failed because another rank is gone."""
    text = str(error)
    signs = ("closed by peer", "Connection reset", "imed out", "timeout", "remote process exited")
    if ranks() == 1 or not any(sign in text for sign in signs):
        return None
    return TrainingError(
        f"another rank died or stopped answering: {text.partition(chr(10))[0]}",
        hint="its own error is in its output; a rank that is only slow needs a longer "
        "train.timeout",
    )
