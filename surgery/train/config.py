"""The shape of a training configuration: sections, defaults, and what does not go together.

Every section is a frozen pydantic model with strict types and no unknown keys. ``data``,
``objective``, ``optim`` and ``schedule`` come in kinds, told apart by one key. Reading a file with
its line numbers is ``reading``'s work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from surgery import shipped
from surgery.errors import RuleError
from surgery.rules import Recipe, Where
from surgery.rules import yaml as yaml_text
from surgery.rules.explain import Problem
from surgery.rules.strict import invalid, problem_error
from surgery.train.data.configs import DataConfig
from surgery.train.objectives.configs import ObjectiveConfig

if TYPE_CHECKING:
    from surgery.train.adapt.config import AdaptConfig
    from surgery.train.finetune.config import FinetuneConfig

    #: What a run can be configured by.
    RunConfig: TypeAlias = "PretrainConfig | FinetuneConfig | AdaptConfig"

VERSION = 1

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Name = Annotated[str, Field(min_length=1)]
Precision = Literal["fp32", "bf16", "fp16"]
OnTrouble = Literal["stop", "skip", "ignore"]


class Section(BaseModel):
    """Base of all sections: frozen, strict, without unknown keys."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelConfig(Section):
    """What is trained, from random weights.

    Attributes:
        source: Any ``surgery.load`` spec, such as ``preset:llama-60m`` or ``timm:resnet18``.
        config: Overrides of the model's own configuration.
        dtype: Floating type of the weights. bfloat16 casts the weights themselves, as the
            GaLore and ANCRe recipes do; for autocast over float32 weights see ``train.precision``.
    """

    source: Name
    config: dict[str, Any] = Field(default_factory=dict[str, Any])
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class AdamWConfig(Section):
    """AdamW (arXiv 1711.05101), fused where the device has it.

    Attributes:
        lr: Learning rate after warm-up.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled; shortcut logits never decay.
    """

    name: Literal["adamw"]
    lr: Positive
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0


class GaloreConfig(Section):
    """AdamW on gradients projected to a low rank (GaLore, arXiv 2403.03507).

    Attributes:
        lr: Learning rate after warm-up.
        rank: Rank of the projection.
        gap: Steps between two projections.
        scale: What the projected update is multiplied with.
        mode: Which sides of a gradient are projected; see ``surgery.optim.projection``.
        targets: Matrices are projected of the layers that this selects, as ``where`` of a rule
            does; the projections of attention and feed-forward layers by default.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled; shortcut logits never decay.
    """

    name: Literal["galore"]
    lr: Positive
    rank: Count
    gap: Count = 200
    scale: Positive = 0.25
    mode: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    targets: Annotated[Where, PlainSerializer(Where.dump)] = Where(role=("attention", "mlp"))
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-6
    weight_decay: NotNegative = 0.0


OptimConfig = Annotated[AdamWConfig | GaloreConfig, Field(discriminator="name")]


class ScheduleConfig(Section):
    """Learning rate over the run.

    Attributes:
        kind: Shape after warm-up.
        warmup: Steps of linear warm-up from zero.
        final: Learning rate at the end, as a fraction of ``optim.lr``; a constant schedule has
            none.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    final: Fraction = 0.0


class SamConfig(Section):
    """Sharpness-aware minimisation (SAM, arXiv 2010.01412): two passes a step.

    Attributes:
        rho: How far the gradient is taken from the weights, uphill.
    """

    name: Literal["sam"]
    rho: Positive = 0.05

    @property
    def theta(self) -> float:
        """Nothing of earlier gradients is kept."""
        return 1.0


class VassoConfig(Section):
    """SAM along a smoothed direction (VASSO, arXiv 2309.15639).

    Attributes:
        rho: How far the gradient is taken from the weights, uphill.
        theta: Weight of the new gradient in the direction; 1 is SAM.
    """

    name: Literal["vasso"]
    rho: Positive = 0.05
    theta: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9


SharpnessConfig = Annotated[SamConfig | VassoConfig, Field(discriminator="name")]


class TrainConfig(Section):
    """The loop.

    Attributes:
        steps: Optimizer steps.
        batch: Samples per optimizer step over all ranks and accumulation steps.
        accumulate: Forward passes per optimizer step on each rank.
        clip: Largest norm of the gradient; None does not clip.
        sharpness: Takes the gradient uphill of the weights (SAM, VASSO), in two passes; None takes
            it at the weights.
        precision: Autocast of the forward pass.
        parallel: How several ranks share the work: each holds the model (``ddp``), or a shard of
            it (``fsdp2``).
        device: ``auto`` takes the accelerator if there is one.
        compile: Whether the model is compiled.
        checkpointing: Whether activations of blocks are computed again in the backward pass.
        on_nan: What a loss or gradient that is not finite does: ``stop`` the run, or ``skip`` the
            step.
        on_spike: What a loss far above its running mean does.
        spike_factor: How many times the running mean a spike is.
        timeout: Seconds after which a collective that a rank does not join ends the run.
        workers: Processes that load data; 0 loads in the training process.
    """

    steps: Count
    batch: Count
    accumulate: Count = 1
    clip: Positive | None = None
    sharpness: SharpnessConfig | None = None
    precision: Precision = "fp32"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = False
    checkpointing: bool = False
    on_nan: Literal["stop", "skip"] = "stop"
    on_spike: OnTrouble = "ignore"
    spike_factor: Annotated[float, Field(gt=1.0)] = 3.0
    timeout: Positive = 600
    workers: Annotated[int, Field(ge=0)] = 0


class EvaluateConfig(Section):
    """Evaluation on held-out data.

    Attributes:
        every: Steps between two evaluations; the last step is evaluated too.
        samples: Held-out samples at most.
        batch: Samples at a time on each rank; ``train.batch`` over ranks and accumulation steps
            by default.
    """

    every: Count = 1000
    samples: Count = 512
    batch: Count | None = None


class CheckpointConfig(Section):
    """Training checkpoints.

    Attributes:
        every: Steps between two checkpoints; the last step is saved too.
        keep: How many are kept.
    """

    every: Count = 1000
    keep: Count = 2


class LogConfig(Section):
    """Logs.

    Attributes:
        every: Steps between two lines.
        tensorboard: Whether TensorBoard files are written.
        matrices: Steps between two records of the coefficient matrices of shortcuts; None
            records none.
    """

    every: Count = 10
    tensorboard: bool = True
    matrices: Count | None = 50


class Configuration(Section):
    """What pretraining and fine-tuning configurations have in common: reading, writing, rules."""

    if TYPE_CHECKING:
        # Declared where it is a field, so that sections are written in the order people expect.
        rules: dict[str, Any] | None

    @field_validator("rules", check_fields=False)
    @classmethod
    def _check_rules(cls, rules: dict[str, Any] | None) -> dict[str, Any] | None:
        """The recipe with every default written out."""
        if rules is None:
            return None
        try:
            return Recipe.parse(rules).dump()
        except RuleError as error:
            message, hint = error.message, error.hint
        raise invalid(message, hint=hint)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        lines = [
            InitErrorDetails(type=problem_error(problem), loc=(), input=None)
            for problem in self.contradictions()
        ]
        if lines:
            raise ValidationError.from_exception_data(type(self).__name__, lines)
        return self

    def contradictions(self) -> Iterator[Problem]:
        """What does not go together where each section is in order."""
        yield from ()

    @classmethod
    def shipped(cls) -> dict[str, Path]:
        """The files of this kind that ship with the library, by name."""
        return {}

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a configuration file.

        Args:
            path: A YAML file, or the name of a shipped configuration of this kind.
            overrides: ``KEY=VALUE`` with dotted keys, such as ``train.steps=10``; values are
                read as YAML.

        Raises:
            ConfigError: there is no such file, or something in it or in an override is wrong;
                with line and column.
        """
        from surgery.train import reading

        return reading.load(cls, path, overrides)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """Build a configuration from plain data, such as ``dump`` returns.

        Raises:
            ConfigError: something in it is wrong.
        """
        from surgery.train import reading

        return reading.parse(cls, data)

    @property
    def recipe(self) -> Recipe | None:
        """The rules, ready to be applied."""
        return None if self.rules is None else Recipe.parse(self.rules)

    def dump(self) -> dict[str, Any]:
        """As JSON-able data that ``parse`` reads back to an equal configuration."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """As a file that ``load`` reads back to an equal configuration, defaults written out."""
        return yaml_text.dump(self.dump())


class PretrainConfig(Configuration):
    """A training run.

    Attributes:
        version: Version of the format.
        name: What logs and plots call the run.
        seed: What weights, order of the data and noise are drawn from.
        rules: A rule file's content that is applied to the model before training. In a file it
            may also be a path, relative to that file.
    """

    version: Literal[1] = VERSION
    name: Name = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig
    rules: dict[str, Any] | None = None
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def shipped(cls) -> dict[str, Path]:
        """The files of this kind that ship with the library, by name."""
        return shipped.pretraining()

    def contradictions(self) -> Iterator[Problem]:
        """What does not go together where each section is in order."""
        yield from _objective_problems(self)
        yield from step_problems(self)


LANGUAGE_DATA = ("text", "tokens", "stream")


def _objective_problems(config: PretrainConfig) -> Iterator[Problem]:
    kind, objective = config.data.kind, config.objective.kind
    loc = ("objective", "kind")
    if (kind in LANGUAGE_DATA) != (objective == "language"):
        known = (
            "language"
            if kind in LANGUAGE_DATA
            else "diffusion"
            if kind == "latents"
            else "classification or diffusion"
        )
        yield Problem(
            loc, f"objective {objective} cannot be trained on {kind} data", f"use {known}"
        )
    elif kind == "latents" and objective == "classification":
        yield Problem(loc, "latents are not classified", "use diffusion")


def _uphill_problems(config: RunConfig) -> Iterator[Problem]:
    """Methods of adapters whose step needs the gradient at the weights."""
    from surgery.optim.rule import GO_UPHILL, StepRule
    from surgery.passes.lowrank import LowRank
    from surgery.registry import STEP_RULES

    for rule in () if config.recipe is None else config.recipe.rules:
        made: object = rule.options
        name = made.kind.step_rule if isinstance(made, LowRank) else None
        if name is None or cast("type[StepRule]", STEP_RULES.get(name)).uphill:
            continue
        yield Problem(
            ("train", "sharpness"),
            f"rule {rule.id!r} trains with {cast('LowRank', made).method}, whose step is made of "
            "the gradients at the factors, and this one takes them uphill",
            f"leave train.sharpness out, or {GO_UPHILL}",
        )


def step_problems(config: RunConfig) -> Iterator[Problem]:
    """What does not go together in how a run steps, whatever it trains."""
    train, schedule, optim = config.train, config.schedule, config.optim
    if optim.name == "galore" and train.parallel == "fsdp2":
        yield Problem(
            ("train", "parallel"),
            "galore does not work with fsdp2: it projects whole gradients, and fsdp2 gives each "
            "rank a shard of them",
            "use parallel: ddp, or optim: {name: adamw}",
        )
    if config.model.dtype != "float32" and train.precision != "fp32":
        yield Problem(
            ("train", "precision"),
            f"autocast to {train.precision} is for float32 weights, and model.dtype is "
            f"{config.model.dtype}",
            "leave one of the two at its default",
        )
    if train.sharpness is not None and train.precision == "fp16":
        yield Problem(
            ("train", "sharpness"),
            "the losses of fp16 are scaled, and the gradient of the first pass with them",
            "use train.precision: bf16 or fp32",
        )
    if train.sharpness is not None:
        yield from _uphill_problems(config)
    if schedule.warmup > train.steps:
        yield Problem(
            ("schedule", "warmup"),
            f"warm-up of {schedule.warmup} steps is longer than the run of {train.steps}",
            "shorten schedule.warmup or raise train.steps",
        )
    # 0 is the default, and 1 is what a constant schedule ends at.
    if schedule.kind == "constant" and 0 < schedule.final < 1:
        yield Problem(
            ("schedule", "final"),
            f"a constant schedule does not end at {schedule.final} of its learning rate",
            "leave final out, or use cosine or linear",
        )
    if train.batch % train.accumulate:
        yield Problem(
            ("train", "batch"),
            f"a batch of {train.batch} cannot be split into {train.accumulate} accumulation steps",
            f"use a multiple of {train.accumulate}",
        )
