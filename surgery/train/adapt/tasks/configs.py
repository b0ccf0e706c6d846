"""Section ``data`` of an adaptation: where tasks come from, and how large they are."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from surgery.rules.strict import invalid
from surgery.train.data.configs import (
    Channels,
    CifarData,
    Count,
    DigitsData,
    DocstringsData,
    FolderData,
    HubData,
    Name,
    RecordsData,
    Section,
    ShiftedDigitsData,
)

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class Episode(Section):
    """Size of a task of classification.

    Attributes:
        ways: Classes of a task.
        shots: Support samples of each class.
        queries: Query samples of each class.
    """

    ways: Annotated[int, Field(ge=2)] = 5
    shots: Count = 1
    queries: Count = 15


class LabelledTasks(Episode):
    """Tasks drawn from any labelled data, with classes that are never trained on.

    The data's own division into samples to train and to evaluate on is undone: classes are divided
    instead.

    Attributes:
        source: Section of the labelled data.
        held_out: Classes for evaluation: by name, or a part of them. A part is taken from the end
            of their list.
    """

    kind: Literal["episodes"] = "episodes"
    source: Annotated[
        DigitsData
        | ShiftedDigitsData
        | FolderData
        | CifarData
        | RecordsData
        | HubData
        | DocstringsData,
        Field(discriminator="kind"),
    ]
    held_out: Share | Annotated[tuple[Name, ...], Field(min_length=1)] = 0.5


class ArrayTasks(Episode):
    """Tasks drawn from arrays of images.

    Attributes:
        path: A NumPy file ``.npz`` with ``images``, uint8 (N, C, H, W) or (N, H, W), or floating
            point in [-1, 1], and ``labels``, integers (N,).
        held_out: Labels for evaluation, or a part of them, taken from the largest on.
    """

    kind: Literal["arrays"] = "arrays"
    path: Name
    held_out: Share | Annotated[tuple[int, ...], Field(min_length=1)] = 0.5


class OmniglotTasks(Episode):
    """Omniglot as its authors publish it (Lake et al. 2015).

    ``images_background/ALPHABET/characterNN/*.png`` is trained on, and ``images_evaluation`` is
    evaluated on. A class is one character of one alphabet.

    Attributes:
        path: The folder that holds both.
        size: Height and width of a sample.
        rotations: Whether a character turned by 90°, 180° and 270° is a class of its own, as is
            usual (arXiv 1605.06065).
    """

    kind: Literal["omniglot"] = "omniglot"
    path: Name
    size: Count = 28
    rotations: bool = True


class MiniImagenetTasks(Episode):
    """mini-ImageNet (arXiv 1606.04080), in either of its usual layouts.

    ``images/*.jpg`` beside ``train.csv``, ``val.csv`` and ``test.csv`` with the columns
    ``filename`` and ``label`` (the division of Ravi and Larochelle), or folders ``train``, ``val``
    and ``test`` with a folder for each class.

    Attributes:
        path: The folder that holds them.
        size: Height and width of a sample.
        channels: 1 (grey) or 3 (colour).
        part: Which classes are evaluated on.
    """

    kind: Literal["mini-imagenet"] = "mini-imagenet"
    path: Name
    size: Count = 84
    channels: Channels = 3
    part: Literal["val", "test"] = "val"


Range = tuple[float, float]


class SinusoidTasks(Section):
    """Regression of sine waves, the standard problem of MAML (arXiv 1703.03400, section 5.1).

    A task is ``y = a sin(x - p)``; its samples are drawn uniformly over ``inputs``.

    Attributes:
        shots: Support samples of a task.
        queries: Query samples of a task.
        amplitude: Between what a is drawn.
        phase: Between what p is drawn.
        inputs: Between what x is drawn.
    """

    kind: Literal["sinusoid"] = "sinusoid"
    shots: Count = 10
    queries: Count = 10
    amplitude: Range = (0.1, 5.0)
    phase: Range = (0.0, 3.141592653589793)
    inputs: Range = (-5.0, 5.0)

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name in ("amplitude", "phase", "inputs"):
            low, high = getattr(self, name)
            if low > high:
                raise invalid(f"a range from {low} to {high} is empty", at=name)
        return self


TaskConfig = Annotated[
    LabelledTasks | ArrayTasks | OmniglotTasks | MiniImagenetTasks | SinusoidTasks,
    Field(discriminator="kind"),
]
