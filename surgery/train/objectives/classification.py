"""Cross entropy over classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.errors import ModelStateError, TrainingError
from surgery.sources.libraries import BUILD_ERRORS
from surgery.train.objectives.base import (
    Batch,
    Gather,
    Objective,
    alone,
    evaluating,
    image_refused,
    logits_of,
    measured,
    placement,
)
from surgery.train.objectives.configs import ClassificationObjective, SequenceObjective

if TYPE_CHECKING:
    from surgery.train.data.base import Facts


class Classification(Objective):
    """Cross entropy of the class of an image, with label smoothing if asked for.

    The model takes images (B, C, H, W) and returns logits (B, K), as a tensor (timm, plain
    modules) or in an output's field ``logits`` (transformers).

    Args:
        config: Section ``objective``.
        facts: What the data is.
        model: The plain model, which is tried on two images.

    Raises:
        ModelStateError: it does not take such images, or has another number of classes.
        TrainingError: the data has no classes.
    """

    def __init__(
        self, config: ClassificationObjective | SequenceObjective, facts: Facts, model: nn.Module
    ) -> None:
        self._smoothing = config.label_smoothing
        _, self._dtype = placement(model)
        logits = self.tried(model, facts)
        if facts.classes is None:
            raise TrainingError(f"{facts.kind} data has no classes", hint=self.unlabelled)
        if logits.ndim != 2 or logits.shape[1] != facts.classes:
            raise ModelStateError(
                f"the data has {facts.classes} classes, and for 2 samples the model returned "
                f"logits {tuple(logits.shape)}; expected (2, {facts.classes})",
                hint=f"set model.config: {{num_classes: {facts.classes}}} (timm) or "
                f"{{num_labels: {facts.classes}}} (transformers)",
            )

    #: What to do about data without classes.
    unlabelled: ClassVar[str] = "use labelled images"

    def loss(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Mean over ``images`` (B, C, H, W) with ``labels`` (B,)."""
        return F.cross_entropy(
            self.logits(model, batch), batch["labels"], label_smoothing=self._smoothing
        )

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], *, gather: Gather = alone
    ) -> dict[str, float]:
        """Mean loss, without label smoothing, and the part of samples that is classified right.

        Returns:
            ``loss`` in nats, and ``accuracy`` from 0 to 1.
        """
        with evaluating(model):
            nats, right, samples = measured(
                batches, lambda batch: self._per_sample(model, batch), gather
            )
        return {"loss": nats / samples, "accuracy": right / samples}

    def tried(self, model: nn.Module, facts: Facts) -> Tensor:
        """The logits of two empty samples of the data's shape."""
        return _tried(model, facts)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Those of a batch: float32 (B, K)."""
        # float32 also where the weights are bfloat16: a loss near its floor has no bits to spare.
        return logits_of(model(batch["images"].to(self._dtype))).float()

    def _per_sample(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats and rightness of each sample: (B, 2)."""
        logits, labels = self.logits(model, batch), batch["labels"]
        nats = F.cross_entropy(logits, labels, reduction="none")
        right = logits.argmax(dim=1) == labels
        return torch.stack([nats, right.to(nats.dtype)], dim=1)


def _tried(model: nn.Module, facts: Facts) -> Tensor:
    """The logits of two empty images of the data's shape."""
    if facts.channels is None or facts.size is None:
        raise TrainingError(f"{facts.kind} data has no images", hint="use data of images")
    device, dtype = placement(model)
    images = torch.zeros(2, facts.channels, *facts.size, device=device, dtype=dtype)
    with evaluating(model):
        try:
            return logits_of(model(images))
        except BUILD_ERRORS as error:
            # What a forward raises for a shape it was not built for is the library's choice.
            raise image_refused(model, facts, error) from error
