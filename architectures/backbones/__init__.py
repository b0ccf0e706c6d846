"""Backbones to pretrain: named sizes of the papers as data, and the plain modules among them.

A preset says which class builds a model and with which arguments. Classes of transformers,
diffusers and timm are only named here; ``MODULES`` are this package's own.
"""

from architectures.backbones.base import Backbone, Preset, UnknownPreset
from architectures.backbones.catalogue import FAMILIES, PRESETS, preset
from architectures.backbones.few_shot import FourConvolutions, Perceptron
from architectures.backbones.mlp import ResidualMLP
from architectures.backbones.resnet import CifarResNet

#: The plain modules that presets name, by the name they use.
MODULES: dict[str, type[Backbone]] = {
    "CifarResNet": CifarResNet,
    "FourConvolutions": FourConvolutions,
    "Perceptron": Perceptron,
    "ResidualMLP": ResidualMLP,
}

__all__ = [
    "FAMILIES",
    "MODULES",
    "PRESETS",
    "Backbone",
    "CifarResNet",
    "FourConvolutions",
    "Perceptron",
    "Preset",
    "ResidualMLP",
    "UnknownPreset",
    "preset",
]
