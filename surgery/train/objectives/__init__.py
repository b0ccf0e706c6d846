"""Objectives: next tokens, classes, denoising."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from surgery.train.config import PretrainConfig
    from surgery.train.data.base import Data
    from surgery.train.objectives.base import Objective


def objective(config: PretrainConfig, data: Data, model: nn.Module) -> Objective:
    """The objective that a configuration names, fitted to the data and tried on the model.

    Args:
        config: The whole configuration.
        data: What is trained on; its facts must fit the model.
        model: The plain model, not yet prepared, on a real device.

    Raises:
        ModelStateError: the model does not fit the data; with both figures.
        TrainingError: the data does not fit the objective.
    """
    section = config.objective
    if section.kind == "language":
        from surgery.train.objectives.language import Language

        return Language(section, data.facts, model)
    if section.kind == "classification":
        from surgery.train.objectives.classification import Classification

        return Classification(section, data.facts, model)
    from surgery.train.objectives.diffusion import Diffusion

    return Diffusion(section, data.facts, model, seed=config.seed, vae=vae_spec(config))


def vae_spec(config: PretrainConfig) -> str | None:
    """The VAE that made the latents of a configuration; None for pixels."""
    return config.data.vae if config.data.kind == "latents" else None
