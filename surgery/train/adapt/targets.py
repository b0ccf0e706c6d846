"""What a task asks for: classes or values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.errors import DataError, ModelStateError
from surgery.sources.libraries import BUILD_ERRORS
from surgery.train.objectives.base import evaluating, first_line, placement
from surgery.train.objectives.classification import Classification
from surgery.train.objectives.configs import ClassificationObjective, SequenceObjective
from surgery.train.objectives.sequences import SequenceClassification

if TYPE_CHECKING:
    from surgery.train.adapt.config import TaskObjective
    from surgery.train.data.base import Facts

Samples = Mapping[str, Tensor]
Forward = Callable[..., Any]


class Target(ABC):
    """Predictions of a model, and how good they are.

    Attributes:
        measures: What ``measured`` returns, in its order.
        answer: Name of the samples' tensor that predictions are compared with.
    """

    measures: ClassVar[tuple[str, ...]]
    answer: ClassVar[str]

    def check(self, samples: Samples) -> None:
        """Refuse answers that no prediction could be.

        Raises:
            DataError: with one of them.
        """
        return

    @abstractmethod
    def predict(self, forward: Forward, samples: Samples) -> Tensor:
        """Predictions (N, ...) for samples (N, ...)."""

    @abstractmethod
    def loss(self, predictions: Tensor, samples: Samples) -> Tensor:
        """Mean loss, a scalar."""

    @abstractmethod
    def measured(self, predictions: Tensor, samples: Samples) -> Tensor:
        """The means over the samples of all measures, (measures,)."""

    @abstractmethod
    def averaged(self, drawn: Tensor) -> Tensor:
        """Predictions (N, ...) of several draws (D, N, ...)."""


class Classes(Target):
    """Classes of images or texts.

    Args:
        aim: Calls the model and gets its logits.
        ways: Classes of a task.
    """

    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "confidence")
    answer: ClassVar[str] = "labels"

    def __init__(self, aim: Classification, ways: int) -> None:
        self._aim = aim
        self._ways = ways

    def check(self, samples: Samples) -> None:
        """Labels are integers from 0 to ways - 1."""
        labels = samples[self.answer]
        low, high = int(labels.min()), int(labels.max())
        if labels.dtype != torch.int64 or low < 0 or high >= self._ways:
            raise DataError(
                f"labels are {labels.dtype} from {low} to {high}, expected torch.int64 from 0 to "
                f"{self._ways - 1}",
                hint="number the classes of the task",
            )

    def predict(self, forward: Forward, samples: Samples) -> Tensor:
        """Logits (N, ways)."""
        return self._aim.logits(cast("nn.Module", forward), samples)

    def loss(self, predictions: Tensor, samples: Samples) -> Tensor:
        """Cross entropy, in nats."""
        return F.cross_entropy(predictions, samples["labels"])

    def measured(self, predictions: Tensor, samples: Samples) -> Tensor:
        """Nats, the part that is right, and the mean probability of what was chosen.

        A model whose confidence is above its accuracy believes in itself too much.
        """
        chances = torch.softmax(predictions, dim=1)
        right = (predictions.argmax(dim=1) == samples["labels"]).to(predictions.dtype)
        return torch.stack(
            [self.loss(predictions, samples), right.mean(), chances.amax(dim=1).mean()]
        )

    def averaged(self, drawn: Tensor) -> Tensor:
        """Logarithms of the mean probabilities."""
        return torch.log_softmax(drawn, dim=2).logsumexp(dim=0) - torch.log(
            torch.tensor(float(len(drawn)))
        )


class Values(Target):
    """Values of a regression."""

    measures: ClassVar[tuple[str, ...]] = ("loss",)
    answer: ClassVar[str] = "targets"

    def predict(self, forward: Forward, samples: Samples) -> Tensor:
        """Values (N, outputs) for ``inputs`` (N, features)."""
        return cast("Tensor", forward(samples["inputs"]))

    def loss(self, predictions: Tensor, samples: Samples) -> Tensor:
        """Mean squared error."""
        # F.mse_loss cannot be mapped twice where one side is the same for the inner map.
        return (predictions - samples["targets"].to(predictions.dtype)).square().mean()

    def measured(self, predictions: Tensor, samples: Samples) -> Tensor:
        """Mean squared error."""
        return self.loss(predictions, samples).reshape(1)

    def averaged(self, drawn: Tensor) -> Tensor:
        """The mean."""
        return drawn.mean(dim=0)


def build_target(
    section: TaskObjective, facts: Facts, model: nn.Module, example: Samples
) -> Target:
    """The target that a configuration names, tried on the model.

    Args:
        section: Section ``objective``.
        facts: What the data is.
        model: The plain model.
        example: Samples of a task.

    Raises:
        ModelStateError: the model does not take such samples, or returns something else.
    """
    if section.kind == "classification":
        aim = Classification(ClassificationObjective(kind=section.kind), facts, model)
        return Classes(aim, _ways(facts))
    if section.kind == "sequence-classification":
        aim = SequenceClassification(SequenceObjective(kind=section.kind), facts, model)
        return Classes(aim, _ways(facts))
    _try_regression(model, example)
    return Values()


def _ways(facts: Facts) -> int:
    assert facts.classes is not None  # noqa: S101 - refused by the objectives
    return facts.classes


def _try_regression(model: nn.Module, example: Samples) -> None:
    device, dtype = placement(model)
    inputs, targets = example["inputs"].to(device, dtype), example["targets"]
    with evaluating(model):
        try:
            found: object = model(inputs)
        except BUILD_ERRORS as error:
            raise ModelStateError(
                f"{type(model).__name__} does not take inputs {tuple(inputs.shape)}: "
                f"{first_line(error)}",
                hint="set model.config, such as {in_features: 1, outputs: 1}",
            ) from error
    if not isinstance(found, Tensor) or found.shape != targets.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelStateError(
            f"for inputs {tuple(inputs.shape)} {type(model).__name__} returned {got}; expected "
            f"values {tuple(targets.shape)}",
            hint="set model.config, such as {outputs: 1}",
        )
