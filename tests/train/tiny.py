"""Small runs for the tests of the trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery import shipped
from surgery.train.config import PretrainConfig

TIMES = ("seconds", "per_second")
#: Gradients projected to rank 4, by other matrices from step 4 and step 7 on.
GALORE = 'optim={"name": "galore", "lr": 1e-2, "rank": 4, "gap": 3, "targets": {"type": "Linear"}}'


def digits(*overrides: str) -> PretrainConfig:
    """A residual MLP of four layers on digits."""
    data: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"source": "preset:mlp-8", "config": {"depth": 4, "width": 16}},
        "data": {"kind": "digits"},
        "objective": {"kind": "classification"},
        "optim": {"name": "adamw", "lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup": 2, "final": 0.1},
        "train": {"steps": 8, "batch": 8, "device": "cpu"},
        "evaluate": {"every": 4, "samples": 50},
        "checkpoint": {"every": 3, "keep": 2},
        "log": {"every": 1, "tensorboard": False, "matrices": 4},
    }
    return changed(data, overrides)


def language(corpus: Path, *overrides: str) -> PretrainConfig:
    """A LLaMA of four narrow layers with learned residual connections on a text file."""
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    data: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"source": "preset:llama-tiny", "config": {**config, "num_attention_heads": 2}},
        "rules": ancre(),
        "data": {
            "kind": "text",
            "path": str(corpus),
            "length": 32,
            "cache": str(corpus.parent / "cache"),
        },
        "objective": {"kind": "language"},
        "optim": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup": 2, "final": 0.1},
        "train": {"steps": 8, "batch": 8, "device": "cpu"},
        "evaluate": {"every": 100, "samples": 10},
        "checkpoint": {"every": 3, "keep": 2},
        "log": {"every": 1, "tensorboard": False, "matrices": 4},
    }
    return changed(data, overrides)


def ancre() -> dict[str, Any]:
    """The shipped rules, as data."""
    from surgery.rules import Recipe

    return Recipe.load(shipped.rules()["ancre"]).dump()


def changed(data: dict[str, Any], overrides: Sequence[str]) -> PretrainConfig:
    """A configuration of plain data with ``section.key=JSON`` put in."""
    return PretrainConfig.parse(overridden(data, overrides))


def overridden(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain data with ``section.key=JSON`` put into it."""
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.rpartition(".")
        place = data
        for step in filter(None, section.split(".")):
            place = place[step]
        place[name] = json.loads(value)
    return data


def corpus(folder: Path) -> Path:
    """A text file of some thousand bytes."""
    path = folder / "corpus.txt"
    text = Path(json.__file__).read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    return path


def log(out: Path, *kinds: str) -> list[dict[str, Any]]:
    """Lines of a run's log without times, of some kinds or of all."""
    found = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in found
        if not kinds or line["kind"] in kinds
    ]


def losses(out: Path) -> list[float]:
    """The logged loss of every step."""
    return [line["loss"] for line in log(out, "step")]
