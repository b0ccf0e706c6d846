"""Small adaptations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.train.adapt.config import AdaptConfig
from tests.train.tiny import overridden


def sinusoid(*overrides: str) -> AdaptConfig:
    """A narrow perceptron on sine waves."""
    data: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {
            "source": "preset:perceptron-40",
            "config": {"width": 8},
            "pretrained": False,
        },
        "data": {"kind": "sinusoid", "shots": 4, "queries": 5},
        "inner": {"steps": 3, "lr": 0.05},
        "objective": {"kind": "regression"},
        "optim": {"name": "adamw", "lr": 1e-2},
        "train": {"steps": 6, "batch": 3, "device": "cpu"},
        "evaluate": {"every": 3, "samples": 4, "inner_steps": [0, 5]},
        "checkpoint": {"every": 2, "keep": 9},
        "log": {"every": 1, "tensorboard": False},
    }
    return made(data, overrides)


def digits(*overrides: str) -> AdaptConfig:
    """Four narrow convolutions on digits, three of them at a time."""
    data: dict[str, Any] = {
        **sinusoid().dump(),
        "model": {
            "source": "preset:conv4-32",
            "config": {"filters": 4, "in_chans": 1, "size": 16, "num_classes": 3},
            "pretrained": False,
        },
        "data": {
            "kind": "episodes",
            "ways": 3,
            "shots": 1,
            "queries": 2,
            "source": {"kind": "digits", "size": 16},
            "held_out": ["7", "8", "9"],
        },
        "inner": {"steps": 2, "lr": 0.05},
        "objective": {"kind": "classification"},
    }
    return made(data, overrides)


def made(data: dict[str, Any], overrides: Sequence[str]) -> AdaptConfig:
    return AdaptConfig.parse(overridden(data, overrides))
