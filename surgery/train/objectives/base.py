"""What an objective is: a loss, an evaluation, and samples, for one kind of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import CheckpointError, ModelStateError, TrainingError

if TYPE_CHECKING:
    from surgery.train.data.base import Facts

Batch = Mapping[str, Tensor]
Gather = Callable[[Tensor], Tensor]

POSITION = "position"


def alone(values: Tensor) -> Tensor:
    """Gathering on one rank."""
    return values


class Objective(ABC):
    """What is minimised, measured and drawn.

    The order of calls in a run is::

        aim = objective(config, data.facts, model)      # the plain model, before it is prepared
        model = accelerator.prepare(model)
        plain = accelerator.unwrap_model(model)
        aim.start(plain)
        aim.load_state_dict(...)                  # on resume
        for step, batch in ...:
            aim.loss(model, batch, step=step).backward()
            optimizer.step()
            aim.stepped()
        aim.evaluate(model, batches, gather=accelerator.gather_for_metrics)
        with aim.averaged():
            surgery.save(plain, out)

    Weights in place are those that ``sample`` draws with: ``averaged`` is for the caller to open.

    A batch carries, beside its samples, ``position``: int64 (B,), their places in the run's order.
    They may stay on the CPU. All randomness of an objective is a function of its seed, the step
    and these positions: neither resuming nor the number of ranks changes it.

    Attributes:
        sample_every: Steps between two calls of ``sample`` during training; None for none.
        weighed: Whether the parts of a batch count as ``weight`` says, and not all the same.
    """

    sample_every: int | None = None
    weighed: bool = False

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """The mean over the samples of ``batch``, a scalar with a gradient.

        Args:
            model: The model as it is trained, wrapped or not.
            batch: Samples of this rank.
            step: The optimizer step that the batch belongs to.
        """

    def weight(self, batch: Batch) -> Tensor:
        """Over how many things ``loss`` of this batch is a mean: a scalar, such as of tokens."""
        raise NotImplementedError(f"{type(self).__name__} is not weighed")

    @abstractmethod
    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], *, gather: Gather = alone
    ) -> dict[str, float]:
        """Measure the model, in eval mode, on held-out samples. Every rank calls it.

        Args:
            model: As for ``loss``; its mode is put back afterwards.
            batches: All held-out samples of this rank.
            gather: Joins (B, ...) values of all ranks, such as
                ``accelerator.gather_for_metrics``.

        Returns:
            ``loss`` and what else the objective measures, the same on all ranks.
        """

    def parameters(self) -> Sequence[nn.Parameter]:
        """What is trained beside the model."""
        return ()

    def sample(self, model: nn.Module, out: Path | None, step: int) -> Path | None:
        """Draw from the model and write what comes, if this objective draws anything.

        Every rank of a sharded model calls it; one of them writes.

        Args:
            model: The plain model.
            out: Folder of samples; None writes nothing.
            step: The step that names the file.

        Returns:
            The file that was written.
        """
        return None

    def start(self, model: nn.Module) -> None:
        """Take note of the plain model once it is prepared (moved, sharded), before step 1."""
        return

    def stepped(self) -> None:
        """Take note that the optimizer has made a step."""
        return

    def averaged(self) -> AbstractContextManager[None]:
        """While it is open, the model has the weights that are the run's result.

        Those are its own ones, unless the objective keeps an average of them.
        """
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside the model; no key where there is nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: it is of another objective or model.
        """
        if state:
            raise CheckpointError(
                f"the checkpoint holds {', '.join(sorted(state))} of another objective; "
                f"{type(self).__name__.lower()} keeps nothing",
                hint="resume with the configuration that the run was started with",
            )


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Eval mode without gradients; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def measured(
    batches: Iterable[Batch], measure: Callable[[Batch], Tensor], gather: Gather
) -> list[float]:
    """Sums over all samples of all ranks.

    Args:
        batches: Held-out samples of this rank.
        measure: Per-sample values (B, n) of one batch.
        gather: Joins the values of all ranks, without those that fill up the last batch.

    Returns:
        The n sums, and last the number of samples.

    Raises:
        TrainingError: there was no sample.
    """
    total: Tensor | None = None
    for batch in batches:
        # float64: a sum over millions of tokens must not depend on how it was split.
        values = gather(measure(batch)).cpu().double()
        counted = torch.cat([values.sum(0), torch.tensor([len(values)], dtype=values.dtype)])
        total = counted if total is None else total + counted
    if total is None:
        raise TrainingError(
            "there is no held-out sample to evaluate on",
            hint="raise data.held_out or evaluate.samples",
        )
    return [float(value) for value in total]


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model's floating-point weights are, and what they are.

    Raises:
        ModelStateError: it has none, or they are on the meta device.
    """
    weight = next((each for each in model.parameters() if each.is_floating_point()), None)
    if weight is None:
        raise ModelStateError("the model has no floating-point parameter to train")
    if weight.is_meta:
        raise ModelStateError(
            "the model is on the meta device; an objective tries it on a few samples",
            hint="load it on a real device first",
        )
    return weight.device, weight.dtype


def logits_of(output: object) -> Tensor:
    """The logits of a forward pass: the tensor itself, or the field of that name.

    Raises:
        ModelStateError: the output is neither.
    """
    logits: object = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelStateError(
            f"the forward pass returned {type(output).__name__} without logits; expected a "
            "tensor or an output with the field 'logits'",
            hint="use a class with a head, such as ...ForCausalLM or ...ForImageClassification",
        )
    return logits


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def image_refused(model: nn.Module, facts: Facts, error: Exception) -> ModelStateError:
    """The error to raise where a model does not take images of the data's shape."""
    height, width = facts.size or (0, 0)
    stem = next((each for each in model.modules() if isinstance(each, nn.Conv2d)), None)
    takes = "" if stem is None else f"; its first convolution takes {stem.in_channels} channels"
    return ModelStateError(
        f"the data has images of {facts.channels} channels, {height} by {width} pixels, which the "
        f"model does not take{takes}: {first_line(error)}",
        hint="set data.channels and data.size, or the model's: model.config: {in_chans: ..., "
        "img_size: ...} (timm), {num_channels: ..., image_size: ...} (transformers)",
    )
