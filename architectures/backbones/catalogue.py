"""Every preset by name, and the families whose names carry a depth."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from architectures.backbones import dit, few_shot, llama, mlp, resnet
from architectures.backbones.base import Preset, UnknownPreset

#: The presets that a list shows, by name; those of a paper and the small ones.
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for family in (llama, dit, resnet, mlp, few_shot)
    for preset in family.PRESETS
}

#: Names with a depth in them, as a person would write the pattern → what finds the preset.
FAMILIES: dict[str, Callable[[str], Preset | None]] = {
    "resnet-DEPTH[-basic|-bottleneck]": resnet.find_imagenet,
    "resnet-DEPTH-cifar[-basic|-bottleneck]": resnet.find_cifar,
    "mlp-DEPTH": mlp.find,
}


def preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        UnknownPreset: there is none; it names the nearest ones, or the nearest valid depths.
    """
    if name in PRESETS:
        return PRESETS[name]
    for find in FAMILIES.values():
        found = find(name)
        if found is not None:
            return found
    near = tuple(difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.6))
    raise UnknownPreset(f"there is no preset {name!r}", near)
