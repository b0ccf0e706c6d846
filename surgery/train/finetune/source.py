"""Where the pretrained model of a run comes from, and the tokenizer that belongs to it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from surgery import progress
from surgery.checkpoints import restore
from surgery.errors import ConfigError, SourceError
from surgery.sources import load
from surgery.train.data.facts import TOKENIZER

if TYPE_CHECKING:
    from pydantic import BaseModel

    from surgery.train.finetune.config import FinetuneConfig, FinetuneModel

_PACKAGE = "package:"
_SAVED = "surgery.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Source:
    """What ``model.source`` names.

    Attributes:
        spec: A spec of ``surgery.load``, or a folder.
        folder: The folder, if it is one.
    """

    spec: str
    folder: Path | None

    @classmethod
    def of(cls, named: str) -> Source:
        """Find out what a source is.

        Raises:
            SourceError: a Python package or a folder in it is missing.
        """
        if named.startswith(_PACKAGE):
            folder = _in_package(named)
            return cls(str(folder), folder)
        return cls(named, Path(named) if Path(named).is_dir() else None)

    @property
    def saved(self) -> bool:
        """Whether ``surgery.save`` wrote it."""
        return self.folder is not None and (self.folder / _SAVED).is_file()

    def tokenizer(self) -> str:
        """The tokenizer beside the model, as ``load_tokenizer`` takes it.

        Raises:
            ConfigError: there is none.
        """
        if self.spec.startswith("hub:"):
            return self.spec
        if self.folder is not None:
            for place in (self.folder, self.folder.parent / TOKENIZER):
                if any((place / name).is_file() for name in _TOKENIZERS):
                    return str(place)
        raise ConfigError(
            f"there is no tokenizer beside the model {self.spec}",
            hint="set data.tokenizer: bytes, a folder, or hub:ORG/NAME",
        )


def load_source(section: FinetuneModel, seed: int) -> nn.Module:
    """The model as it comes, on the CPU; random weights are drawn from the seed.

    Raises:
        SourceError: it cannot be had, or has no weights.
        CheckpointError: its weights are missing or broken.
    """
    source = Source.of(section.source)
    cast("Any", torch).manual_seed(seed)
    with progress.task(f"loading {section.source}"):
        if source.saved and source.folder is not None:
            return _restored(section, source.folder)
        return load(
            source.spec,
            config=section.config,
            pretrained=section.pretrained,
            dtype=section.dtype,
        )


def with_tokenizer(config: FinetuneConfig) -> Any:
    """The section ``data``, ``tokenizer: model`` replaced by where that tokenizer is.

    Raises:
        ConfigError: the model comes without one.
    """
    return tokenized(config.data, config.model.source)


def tokenized(data: BaseModel, source: str) -> Any:
    """A section of data, ``tokenizer: model`` replaced by where the tokenizer of a model is.

    Raises:
        ConfigError: the model comes without one.
    """
    if data.model_dump().get("tokenizer") != "model":
        return data
    return data.model_copy(update={"tokenizer": Source.of(source).tokenizer()})


def _restored(section: FinetuneModel, folder: Path) -> nn.Module:
    if section.config or not section.pretrained:
        raise SourceError(
            f"{folder} is a model that surgery.save wrote: it comes as it is, with its weights",
            hint="leave model.config and model.pretrained out",
        )
    return restore(folder).to(cast("torch.dtype", getattr(torch, section.dtype)))


def _in_package(named: str) -> Path:
    package, _, inside = named.removeprefix(_PACKAGE).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise SourceError(
            f"{named!r}: there is no Python package {package!r}", hint="install it with pip"
        )
    places = [Path(place) / inside for place in found.submodule_search_locations]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise SourceError(f"{named!r}: the package {package} has no folder {inside!r}")
    return folder
