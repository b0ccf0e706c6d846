"""The shape of an adaptation's configuration: the sections of training, and what differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer

from surgery import shipped
from surgery.rules import Where
from surgery.rules.explain import Problem
from surgery.train.adapt.tasks.configs import LabelledTasks, TaskConfig
from surgery.train.config import (
    VERSION,
    AdamWConfig,
    CheckpointConfig,
    Configuration,
    Count,
    EvaluateConfig,
    LogConfig,
    Name,
    NotNegative,
    Positive,
    ScheduleConfig,
    Section,
    TrainConfig,
    step_problems,
)
from surgery.train.data.configs import TEXTS
from surgery.train.finetune.config import FinetuneModel


class InnerConfig(Section):
    """The inner loop: how a task is adapted to.

    Attributes:
        steps: Gradient steps.
        lr: Step size, or what learned ones start from.
        rule: ``shared`` is one fixed step size (MAML), ``per-parameter`` a learned one for each
            scalar (Meta-SGD), ``preconditioned`` a learned matrix for each mode of a tensor
            (Meta-Curvature).
        where: What adapts, selected as ``where`` of a rule does; by default all that is trained.
            What is trained and does not adapt is the same for all tasks.
        parallel: Tasks of a batch one by one in a ``loop``, or side by side with ``vmap``, which
            not every model allows.
        statistics: Batch norms normalise by the samples of the ``episode``, or by statistics that
            were recorded before (``running``), which nothing here changes.
        dropout: Whether dropout is on in the inner loop of the training.
        proximal: Pull back to the start, λ; ``estimator: implicit`` needs one.
    """

    steps: Count = 5
    lr: Positive = 0.01
    rule: Literal["shared", "per-parameter", "preconditioned"] = "shared"
    where: Annotated[Where, PlainSerializer(Where.dump)] | None = None
    parallel: Literal["loop", "vmap"] = "loop"
    statistics: Literal["episode", "running"] = "episode"
    dropout: bool = False
    proximal: NotNegative = 0.0


class UnrolledConfig(Section):
    """The exact meta-gradient, through every inner step (MAML, arXiv 1703.03400)."""

    name: Literal["unrolled"] = "unrolled"


class FirstOrderConfig(Section):
    """Inner gradients are constants (FOMAML)."""

    name: Literal["first-order"]


class TruncatedConfig(Section):
    """Through the last inner steps only.

    Attributes:
        terms: How many.
    """

    name: Literal["truncated"]
    terms: Count


class BinomialConfig(Section):
    """Every product of at most ``terms`` second derivatives (BinomGBML, arXiv 2604.13263).

    Attributes:
        terms: L.
        side_by_side: Hessian-vector products at once; more take more memory.
        scale: What every second derivative is multiplied by: 1 is the paper's formula, L over the
            inner steps what its authors' code does.
    """

    name: Literal["binomial"]
    terms: Count
    side_by_side: Count = 1
    scale: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


class ImplicitConfig(Section):
    """Implicit differentiation by conjugate gradients (iMAML, arXiv 1909.04630).

    Attributes:
        solver_steps: Steps of conjugate gradients.
    """

    name: Literal["implicit"]
    solver_steps: Count = 5


class BayesianConfig(Section):
    """Implicit differentiation of a Gaussian posterior (iBaML).

    Attributes:
        kl_weight: Weight of the prior over that of all support samples together.
        draws: Draws of the parameters in training.
        predictive_draws: Draws that a prediction is averaged over.
        solver_steps: Steps of conjugate gradients.
    """

    name: Literal["bayesian"]
    kl_weight: Positive = 1e-2
    draws: Count = 5
    predictive_draws: Count = 10
    solver_steps: Count = 5


EstimatorConfig = Annotated[
    UnrolledConfig
    | FirstOrderConfig
    | TruncatedConfig
    | BinomialConfig
    | ImplicitConfig
    | BayesianConfig,
    Field(discriminator="name"),
]


class TaskClasses(Section):
    """Cross entropy over the classes of images."""

    kind: Literal["classification"]


class TaskTexts(Section):
    """Cross entropy over the classes of texts."""

    kind: Literal["sequence-classification"]


class TaskRegression(Section):
    """Mean squared error."""

    kind: Literal["regression"]


TaskObjective = Annotated[TaskClasses | TaskTexts | TaskRegression, Field(discriminator="kind")]


class AdaptEvaluate(EvaluateConfig):
    """Evaluation on held-out tasks.

    Attributes:
        samples: Held-out tasks; the same ones for every seed.
        inner_steps: Further numbers of inner steps after which tasks are measured.
    """

    samples: Count = 100
    inner_steps: tuple[Annotated[int, Field(ge=0)], ...] = ()


class AdaptConfig(Configuration):
    """Meta-training: learning to adapt to a task in a few steps.

    A sample is a task: ``train.batch`` counts tasks of a meta-step, ``evaluate.samples`` held-out
    tasks.

    Attributes:
        version: Version of the format.
        name: What logs and plots call the run.
        seed: What weights and tasks are drawn from. Held-out tasks do not depend on it.
        model: What is meta-trained; with ``pretrained: false`` from random weights.
        rules: A rule file's content that is applied to the model before training. In a file it
            may also be a path, relative to that file. Without rules all of the model is trained.
        data: Where tasks come from.
        inner: The inner loop.
        estimator: How the meta-gradient is found.
    """

    version: Literal[1] = VERSION
    name: Name = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: FinetuneModel
    rules: dict[str, Any] | None = None
    data: TaskConfig
    inner: InnerConfig = InnerConfig()
    estimator: EstimatorConfig = UnrolledConfig()
    objective: TaskObjective
    optim: AdamWConfig
    schedule: ScheduleConfig = ScheduleConfig(kind="constant")
    train: TrainConfig
    evaluate: AdaptEvaluate = AdaptEvaluate()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def shipped(cls) -> dict[str, Path]:
        """The files of this kind that ship with the library, by name."""
        return shipped.adaptations()

    def contradictions(self) -> Iterator[Problem]:
        """What does not go together where each section is in order."""
        yield from step_problems(self)
        yield from _objective_problems(self)
        yield from _estimator_problems(self)
        yield from _training_problems(self)
        if self.model.unfreeze is not None and self.rules is None:
            yield Problem(
                ("model", "unfreeze"),
                "without rules all of the model is trained",
                "leave model.unfreeze out; inner.where says what adapts",
            )


def _objective_problems(config: AdaptConfig) -> Iterator[Problem]:
    data, objective = config.data, config.objective.kind
    if data.kind == "sinusoid":
        fitting = "regression"
    elif isinstance(data, LabelledTasks) and data.source.kind in TEXTS:
        fitting = "sequence-classification"
    else:
        fitting = "classification"
    if objective != fitting:
        yield Problem(
            ("objective", "kind"),
            f"objective {objective} does not go with tasks of {data.kind} data",
            f"use {fitting}",
        )


def _estimator_problems(config: AdaptConfig) -> Iterator[Problem]:
    inner, estimator = config.inner, config.estimator
    name = estimator.name
    if isinstance(estimator, TruncatedConfig | BinomialConfig) and estimator.terms > inner.steps:
        yield Problem(
            ("estimator", "terms"),
            f"{estimator.terms} terms, and there are {inner.steps} inner steps",
            f"use at most {inner.steps}; as many are estimator: {{name: unrolled}}",
        )
    implicit = name in ("implicit", "bayesian")
    if implicit and inner.rule != "shared":
        yield Problem(
            ("inner", "rule"),
            f"where the inner loop comes to rest does not depend on its step sizes, so that "
            f"{name} gives what rule {inner.rule} learns no gradient",
            "use rule: shared, or another estimator",
        )
    if name == "implicit" and not inner.proximal:
        yield Problem(
            ("inner", "proximal"),
            "implicit needs the pull back to the start: without it, where the inner loop comes to "
            "rest does not depend on where it starts",
            "set inner.proximal, as in 1.0",
        )
    if name in ("binomial", "bayesian") and inner.proximal:
        yield Problem(
            ("inner", "proximal"),
            f"{name} is of an inner loop without a pull back to the start",
            "leave inner.proximal out",
        )
    if name in ("binomial", "implicit", "bayesian") and inner.dropout:
        yield Problem(
            ("inner", "dropout"),
            f"{name} computes inner gradients again, under other dropout masks",
            "leave inner.dropout out, or use unrolled, truncated or first-order",
        )


def _training_problems(config: AdaptConfig) -> Iterator[Problem]:
    train = config.train
    if train.precision != "fp32":
        yield Problem(
            ("train", "precision"),
            "second derivatives are not taken under autocast",
            "leave train.precision out",
        )
    if train.compile:
        yield Problem(
            ("train", "compile"), "the inner loop is not compiled", "leave train.compile out"
        )
    if train.checkpointing:
        yield Problem(
            ("train", "checkpointing"),
            "activations that are computed again cannot be differentiated twice",
            "leave train.checkpointing out; estimator: {name: binomial} needs less memory",
        )
    if train.on_nan == "skip":
        yield Problem(
            ("train", "on_nan"),
            "an inner loop that diverges goes on diverging: it ends the run",
            "leave train.on_nan out",
        )
    if train.parallel != "ddp":
        yield Problem(("train", "parallel"), "tasks are adapted to in one process", "leave it out")
