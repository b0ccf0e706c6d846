"""The shape of a fine-tuning configuration: the sections of pretraining, and what differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer

from surgery import shipped
from surgery.rules import Where
from surgery.rules.explain import Problem
from surgery.train.config import (
    VERSION,
    AdamWConfig,
    CheckpointConfig,
    Configuration,
    EvaluateConfig,
    GaloreConfig,
    LogConfig,
    Name,
    ScheduleConfig,
    Section,
    TrainConfig,
    step_problems,
)
from surgery.train.data.configs import TEXTS, Columns, FinetuneDataConfig
from surgery.train.objectives.configs import FinetuneObjectiveConfig


class FinetuneModel(Section):
    """What is fine-tuned.

    Attributes:
        source: Any ``surgery.load`` spec with weights; a folder that ``surgery.save`` wrote, such
            as ``model`` in a run's folder; or ``package:NAME/FOLDER``, a folder in an installed
            Python package.
        config: Overrides of the model's own configuration.
        dtype: Floating type of the weights; for autocast over float32 weights see
            ``train.precision``.
        pretrained: Whether weights are loaded. Without, they are drawn from ``seed``.
        head: Whether the classification or language head is made anew, from ``seed``: ``auto``
            where the source has none that fits the data, ``new`` always, ``keep`` never.
        unfreeze: What is trained beside adapters and a new head, selected as ``where`` of a rule
            does.
    """

    source: Name
    config: dict[str, Any] = Field(default_factory=dict[str, Any])
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    pretrained: bool = True
    head: Literal["auto", "new", "keep"] = "auto"
    unfreeze: Annotated[Where, PlainSerializer(Where.dump)] | None = None


class FinetuneAdamW(AdamWConfig):
    """AdamW, with another learning rate for the adapters' B if asked for.

    Attributes:
        loraplus: What the learning rate of B is multiplied by (LoRA+, arXiv 2402.12354); None
            trains all with one.
    """

    loraplus: Annotated[float, Field(ge=1.0)] | None = None


FinetuneOptim = Annotated[FinetuneAdamW | GaloreConfig, Field(discriminator="name")]


class FinetuneCheckpoint(CheckpointConfig):
    """Training checkpoints.

    Attributes:
        weights: ``changed`` leaves out frozen weights that are as they were loaded, in every bit:
            a resume takes them from ``model.source``. ``all`` writes the whole model. A sharded
            run writes the whole model in any case.
    """

    weights: Literal["changed", "all"] = "changed"


class FinetuneConfig(Configuration):
    """A fine-tuning run.

    Attributes:
        version: Version of the format.
        name: What logs and plots call the run.
        seed: What new weights, order of the data and noise are drawn from.
        rules: A rule file's content that is applied to the model before training. In a file it
            may also be a path, relative to that file. Without rules all of the model is trained.
    """

    version: Literal[1] = VERSION
    name: Name = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: FinetuneModel
    rules: dict[str, Any] | None = None
    data: FinetuneDataConfig
    objective: FinetuneObjectiveConfig
    optim: FinetuneOptim
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: FinetuneCheckpoint = FinetuneCheckpoint()
    log: LogConfig = LogConfig()

    @classmethod
    def shipped(cls) -> dict[str, Path]:
        """The files of this kind that ship with the library, by name."""
        return shipped.finetuning()

    def contradictions(self) -> Iterator[Problem]:
        """What does not go together where each section is in order."""
        yield from _data_problems(self)
        yield from step_problems(self)
        if self.model.unfreeze is not None and self.rules is None:
            yield Problem(
                ("model", "unfreeze"),
                "without rules all of the model is trained",
                "leave model.unfreeze out, or add rules, such as rules: ../rules/lora.yaml",
            )


_PACKED = ("text", "tokens", "stream")
_GOES_WITH = {
    "language": (*_PACKED, *TEXTS),
    "masked-language": (*_PACKED, *TEXTS),
    "sequence-classification": TEXTS,
}
_IMAGES = ("digits", "shifted-digits", "folder", "cifar", "imagenet", "webdataset")


def _data_problems(config: FinetuneConfig) -> Iterator[Problem]:
    data, objective = config.data, config.objective.kind
    images = (*_IMAGES, "latents") if objective == "diffusion" else _IMAGES
    fitting = _GOES_WITH.get(objective, images)
    if data.kind not in fitting:
        yield Problem(
            ("objective", "kind"),
            f"objective {objective} cannot be trained on {data.kind} data",
            f"its kinds of data: {', '.join(fitting)}",
        )
    if objective == "sequence-classification" and isinstance(data, Columns):
        if data.label is None:
            message = "texts are to be classified, and no column holds their class"
            yield Problem(("data",), message, "set data.label")
    elif objective in ("language", "masked-language") and data.kind in TEXTS:
        yield from _label_problems(config)


def _label_problems(config: FinetuneConfig) -> Iterator[Problem]:
    """Classes are of no use where tokens are predicted."""
    data = config.data
    if data.kind == "docstrings" or (isinstance(data, Columns) and data.label is not None):
        yield Problem(
            ("data", "kind"),
            f"objective {config.objective.kind} predicts tokens, and the data has classes",
            "leave data.label out, or use objective: {kind: sequence-classification}",
        )
