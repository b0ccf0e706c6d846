"""How a denoising model is called, found out once from its signature and a trial."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import ModelStateError, TrainingError
from surgery.sources.libraries import BUILD_ERRORS, require
from surgery.train.objectives.base import evaluating, image_refused, placement

if TYPE_CHECKING:
    from surgery.train.data.base import Facts


@dataclass(frozen=True)
class Denoiser:
    """A model of diffusers from noised samples to predictions.

    Attributes:
        channels: Channels of a sample.
        dtype: What samples are cast to.
        labelled: Whether the model is conditioned on classes.
        null: The class that stands for no label; None where the model has none.
        learns_variance: Whether the model returns twice the channels, the second half being the
            variance of the reverse step.
    """

    channels: int
    dtype: torch.dtype
    labelled: bool
    null: int | None
    learns_variance: bool

    def __call__(
        self, model: nn.Module, noised: Tensor, timesteps: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Call the model.

        Args:
            model: The model, wrapped or not.
            noised: (B, C, H, W).
            timesteps: int64 (B,).
            labels: int64 (B,); not used by a model without labels.

        Returns:
            The prediction and the variance's part, each float32 (B, C, H, W); the latter None
            where the model learns none.
        """
        given: dict[str, Any] = {"class_labels": labels} if self.labelled else {}
        output = _sample_of(model(noised.to(self.dtype), timestep=timesteps, **given)).float()
        if not self.learns_variance:
            return output, None
        return output[:, : self.channels], output[:, self.channels :]


def fit(model: nn.Module, facts: Facts, *, nullable: bool) -> Denoiser:
    """Try a model on the data's shape.

    Diffusers' own label dropout is switched off: it draws from the global generator, and would
    depend on the number of ranks. Labels are dropped before the model sees them instead.

    Args:
        model: The plain model.
        facts: What the data is.
        nullable: Whether labels are dropped, so that the model has to have a null class.

    Raises:
        ModelStateError: it does not take such samples, timesteps or labels.
        TrainingError: the data has no images, or no labels for a model that wants them.
    """
    if facts.channels is None or facts.size is None:
        raise TrainingError(f"{facts.kind} data has no images", hint="use data of images")
    _check_size(model, facts.size)
    labelled, null = _labels_of(model, facts, nullable=nullable)
    device, dtype = placement(model)
    samples = torch.zeros(2, facts.channels, *facts.size, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    made = Denoiser(facts.channels, dtype, labelled, null, learns_variance=False)
    with evaluating(model):
        try:
            output, _ = made(model, samples, zeros, zeros)
        except BUILD_ERRORS as error:
            # What a forward raises for a shape it was not built for is the library's choice.
            raise image_refused(model, facts, error) from error
    once, twice = ((2, k * facts.channels, *facts.size) for k in (1, 2))
    if tuple(output.shape) not in (once, twice):
        raise ModelStateError(
            f"for samples {once} the model returned {tuple(output.shape)}; expected the same "
            f"shape, or {twice} where it learns the variance",
            hint=f"set model.config: {{out_channels: {facts.channels}}}",
        )
    return replace(made, learns_variance=tuple(output.shape) == twice)


def _labels_of(model: nn.Module, facts: Facts, *, nullable: bool) -> tuple[bool, int | None]:
    """Whether the model is conditioned on classes, and its null class; takes over their dropout."""
    parameters = inspect.signature(model.forward).parameters
    if "timestep" not in parameters:
        raise ModelStateError(
            f"{type(model).__name__} takes no timestep, so it is no denoiser",
            hint="use a model of diffusers, such as preset:dit-tiny",
        )
    slots = _slots(model) if "class_labels" in parameters else None
    if slots is None:
        return False, None
    if facts.classes is None:
        raise TrainingError(
            f"the model is conditioned on classes, and {facts.kind} data has none",
            hint="use labelled images, or a model without labels",
        )
    classes, null = slots
    if null is None and nullable:
        # No row is set aside for it: the last one is taken.
        classes = null = classes - 1
    if facts.classes > classes:
        raise ModelStateError(
            f"the data has {facts.classes} classes, and the model embeds {classes}"
            f"{'' if null is None else ' and the null class'}",
            hint=f"set model.config: {{num_embeds_ada_norm: {facts.classes}}} (DiT), or "
            f"{{num_class_embeds: {facts.classes + nullable}}} (UNet2DModel)",
        )
    return True, null


def _slots(model: nn.Module) -> tuple[int, int | None] | None:
    """Classes that a model embeds, and the row beside them that is for none; None: no labels."""
    require("diffusers")
    from diffusers.models.embeddings import LabelEmbedding

    embeddings: list[Any] = [each for each in model.modules() if isinstance(each, LabelEmbedding)]
    for each in embeddings:
        # Only what dropout does in train mode hangs on it; the table keeps its null row.
        each.dropout_prob = 0.0
    if embeddings:
        classes = min(each.num_classes for each in embeddings)
        rows = min(each.embedding_table.num_embeddings for each in embeddings)
        return classes, classes if rows > classes else None
    slots: object = getattr(getattr(model, "config", None), "num_class_embeds", None)
    return (slots, None) if isinstance(slots, int) else None


def _check_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Refuse a model configured for another size: pipelines would sample at that one."""
    own: Any = getattr(getattr(model, "config", None), "sample_size", None)
    expected = (own, own) if isinstance(own, int) else own
    if expected is None or tuple(expected) == tuple(size):
        return
    raise ModelStateError(
        f"the data has samples of {size[0]} by {size[1]}, and the model's sample_size is {own}",
        hint=f"set model.config: {{sample_size: {size[0]}}}, or data.size",
    )


def _sample_of(output: object) -> Tensor:
    sample: object = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    if not isinstance(sample, Tensor):
        raise ModelStateError(
            f"the forward pass returned {type(output).__name__}; expected a tensor or an output "
            "with the field 'sample', as models of diffusers have"
        )
    return sample
