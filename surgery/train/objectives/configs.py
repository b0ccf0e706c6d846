"""Sections ``objective`` of a training configuration, one per kind."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from surgery.rules.strict import invalid

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class TextSampling(_Section):
    """Text drawn from the model.

    Attributes:
        every: Steps between two draws during training.
        prompts: What is continued.
        tokens: New tokens for each prompt.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Tokens that are drawn from; None for all.
        seed: Seed of the draw.
    """

    every: Count = 1000
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("def ",)
    tokens: Count = 128
    temperature: Annotated[float, Field(ge=0.0)] = 0.8
    top_k: Count | None = 50
    seed: Seed = 0


class ImageSampling(_Section):
    """Images drawn from the model, as a grid.

    Attributes:
        every: Steps between two grids during training.
        scheduler: Sampler: ancestral (``ddpm``, arXiv 2006.11239), deterministic (``ddim``,
            arXiv 2010.02502), or the multistep solver DPM-Solver++ (``dpm``, arXiv 2211.01095).
        steps: Calls of the model for one image.
        guidance: Scale of classifier-free guidance (arXiv 2207.12598); 1 is none.
        count: Images in a grid; their classes go round.
        seed: Seed of the noise: image i is the same whatever ``count`` is.
    """

    every: Count = 1000
    scheduler: Literal["ddpm", "ddim", "dpm"] = "ddim"
    steps: Count = 50
    guidance: Annotated[float, Field(ge=1.0)] = 1.5
    count: Count = 20
    seed: Seed = 0

    @model_validator(mode="after")
    def _enough_steps(self) -> Self:
        if self.scheduler == "ddpm" and self.steps < 2:
            raise invalid(
                "ddpm goes from the last level to the first, which takes 2 steps or more",
                hint="raise steps",
                at="steps",
            )
        return self


class LanguageObjective(_Section):
    """Next-token prediction.

    Attributes:
        sample: Text drawn during training; None draws none.
    """

    kind: Literal["language"]
    sample: TextSampling | None = None


class ClassificationObjective(_Section):
    """Cross entropy over classes.

    Attributes:
        label_smoothing: Part of the target that is spread over all classes
            (arXiv 1512.00567). Evaluation is without it.
    """

    kind: Literal["classification"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class DiffusionObjective(_Section):
    """Denoising as in DiT (arXiv 2212.09748), on a linear schedule.

    Attributes:
        prediction: What the model predicts: the noise, or the velocity (arXiv 2202.00512).
        steps: Noise levels. The schedule's ends are scaled by 1000 / steps, so that the last
            level is noise whatever their number (arXiv 2102.09672).
        label_dropout: How often a label is replaced by the null class.
        ema: Decay of the averaged weights; None keeps no average.
        sample: Images drawn during training; None draws none.
    """

    kind: Literal["diffusion"]
    prediction: Literal["epsilon", "v"] = "epsilon"
    # Below 21 levels the scaled schedule would end at a beta of 1 or more.
    steps: Annotated[int, Field(ge=21)] = 1000
    label_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.9999
    sample: ImageSampling | None = None

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.sample is None:
            return self
        if self.sample.steps > self.steps:
            raise invalid(
                f"{self.sample.steps} sampling steps, and the schedule has {self.steps} levels",
                hint="lower objective.sample.steps",
                at="sample",
            )
        if self.sample.guidance > 1 and self.label_dropout == 0:
            raise invalid(
                f"guidance {self.sample.guidance} needs the null class, which a label_dropout "
                "of 0 never trains",
                hint="set label_dropout: 0.1, or sample.guidance: 1.0",
                at="sample",
            )
        return self


ObjectiveConfig = Annotated[
    LanguageObjective | ClassificationObjective | DiffusionObjective, Field(discriminator="kind")
]


class SequenceObjective(_Section):
    """Cross entropy over classes of texts.

    Attributes:
        label_smoothing: As for images.
    """

    kind: Literal["sequence-classification"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class MaskedObjective(_Section):
    """Guessing masked tokens (arXiv 1810.04805).

    Attributes:
        share: Part of a sample's tokens that are guessed; of those 80 % are masked, 10 % are other
            tokens, and 10 % stay as they are.
    """

    kind: Literal["masked-language"]
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15


FinetuneObjectiveConfig = Annotated[
    LanguageObjective
    | MaskedObjective
    | SequenceObjective
    | ClassificationObjective
    | DiffusionObjective,
    Field(discriminator="kind"),
]
