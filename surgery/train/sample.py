"""``sample``: text or images from the model that a run ended with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from surgery import progress
from surgery.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from surgery.train.config import PretrainConfig

# As ``pretrain`` names them.
_CONFIG, _MODEL, _AVERAGED, _SAMPLES = "config.yaml", "model", "model-ema", "samples"


@dataclass(frozen=True)
class Drawn:
    """What was drawn from a run.

    Attributes:
        path: The file it was written to: text, or a grid of images as PNG.
        model: The folder of the model it was drawn from.
        texts: Prompts with their continuations; None for images.
    """

    path: Path
    model: Path
    texts: tuple[str, ...] | None = None

    def view(self) -> RenderableType:
        """The texts, or where the images are."""
        if self.texts is None:
            return Text(str(self.path))
        return Group(*(Text(_shown(text) + "\n") for text in self.texts))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "path": str(self.path),
            "model": str(self.model),
            "texts": None if self.texts is None else list(self.texts),
        }


def _shown(text: str) -> str:
    """Text without what a terminal would obey, such as escape sequences."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def sample(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    device: str | torch.device | None = None,
) -> Drawn:
    """Draw from the model of a finished run; from its averaged weights, if it kept an average.

    Args:
        run: The run's folder.
        overrides: Fields of ``objective.sample`` as ``KEY=VALUE``, over those of the run, such as
            ``steps=100`` or ``prompts=[import]``; values are read as YAML.
        out: File to write; by default ``samples/sample.png`` or ``.txt`` in the run's folder.
        device: Where the model is put.

    Raises:
        TrainingError: there is no such run, it has not ended, or nothing can be drawn from it.
        ConfigError: an override is wrong.
        CheckpointError: the saved model is damaged.
        DataError: what the run wrote down of its data is missing or broken.
    """
    from surgery.checkpoints import restore
    from surgery.train.data.facts import read_facts
    from surgery.train.objectives import objective
    from surgery.train.objectives.diffusion import Diffusion
    from surgery.train.objectives.language import Language

    folder = Path(run)
    config = _config(folder, overrides)
    saved = _model(folder)
    with progress.task(f"restoring {saved}"):
        model = restore(saved, device=device)
    with progress.task("sampling"):
        aim = objective(config, read_facts(folder), model)
        if isinstance(aim, Language):
            target = out or folder / _SAMPLES / "sample.txt"
            texts = aim.draw(model)
            return Drawn(aim.write(texts, target), saved, tuple(texts))
        assert isinstance(aim, Diffusion)  # noqa: S101 - _config has refused the others
        target = out or folder / _SAMPLES / "sample.png"
        return Drawn(aim.write(aim.draw(model), target), saved)


def _config(folder: Path, overrides: Sequence[str]) -> PretrainConfig:
    """The run's configuration with a section ``objective.sample``, changed by the overrides."""
    from surgery.train.config import PretrainConfig

    path = folder / _CONFIG
    if not path.is_file():
        raise TrainingError(
            f"{folder} is no run: it has no {_CONFIG}",
            hint="name the folder that surgery pretrain wrote to",
        )
    section = PretrainConfig.load(path).objective
    if section.kind == "classification":
        raise TrainingError(
            f"the run in {folder} trained a classifier: there is nothing to draw from it"
        )
    # A run that drew nothing while it trained draws with the defaults.
    begin = [] if section.sample is not None else ["objective.sample={}"]
    return PretrainConfig.load(path, [*begin, *(f"objective.sample.{each}" for each in overrides)])


def _model(folder: Path) -> Path:
    for name in (_AVERAGED, _MODEL):
        if (folder / name).is_dir():
            return folder / name
    raise TrainingError(
        f"the run in {folder} has not ended: it has no {_MODEL}",
        hint="go on with surgery pretrain --resume",
    )
