"""Objectives: next tokens, masked tokens, classes of images and of texts, denoising."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from surgery.train.config import PretrainConfig
    from surgery.train.data.base import Facts
    from surgery.train.finetune.config import FinetuneConfig
    from surgery.train.objectives.base import Objective


def objective(config: PretrainConfig | FinetuneConfig, facts: Facts, model: nn.Module) -> Objective:
    """The objective that a configuration names, fitted to the data and tried on the model.

    Args:
        config: The whole configuration.
        facts: What the data is, which the model must fit.
        model: The plain model, not yet prepared, on a real device.

    Raises:
        ModelStateError: the model does not fit the data; with both figures.
        TrainingError: the data does not fit the objective.
    """
    section = config.objective
    if section.kind == "language":
        from surgery.train.objectives.language import Language

        return Language(section, facts, model)
    if section.kind == "classification":
        from surgery.train.objectives.classification import Classification

        return Classification(section, facts, model)
    if section.kind == "sequence-classification":
        from surgery.train.objectives.sequences import SequenceClassification

        return SequenceClassification(section, facts, model)
    if section.kind == "masked-language":
        from surgery.train.objectives.masked import MaskedLanguage

        return MaskedLanguage(section, facts, model, seed=config.seed)
    from surgery.train.objectives.diffusion import Diffusion

    return Diffusion(section, facts, model, seed=config.seed, vae=vae_spec(config))


def vae_spec(config: PretrainConfig | FinetuneConfig) -> str | None:
    """The VAE that made the latents of a configuration; None for pixels."""
    return config.data.vae if config.data.kind == "latents" else None
